"""On the repository's own studies: what an edit of a module makes stale, and what no job's code may contain."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from papers import registry
from workflow import settings
from workflow.specs import Plan

ROOT = Path(__file__).parents[2]
CONFIG = settings.whole(settings.files([ROOT / "config.yaml", ROOT / "workflow" / "presets" / "smoke.yaml"]))
STUDIES = sorted(registry.folders())


def codes(root: Path) -> dict[tuple[str, str], str]:
    """Code hash by stage and name of every job."""
    return {(job.stage, job.name): job.code for job in Plan(CONFIG, root).jobs()}


@pytest.fixture(scope="module")
def before() -> dict[tuple[str, str], str]:
    return codes(ROOT)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


def edited(checkout: Path, module: str, name: str) -> None:
    """Give a function or class of a module another body."""
    file = (checkout / "lib").joinpath(*module.split(".")).with_suffix(".py")
    text = file.read_text()
    assert f"\ndef {name}(" in text or f"\nclass {name}(" in text
    lines = text.splitlines(keepends=True)
    row = next(i for i, line in enumerate(lines) if line.startswith((f"def {name}(", f"class {name}(")))
    lines.insert(row, f"@(lambda {name}: {name})\n")
    file.write_text("".join(lines))


def stale(before: dict[tuple[str, str], str], root: Path) -> dict[str, set[str]]:
    """Names of the jobs whose code is no longer what it was, by stage."""
    found: dict[str, set[str]] = {}
    for (stage, name), code in codes(root).items():
        if code != before[stage, name]:
            found.setdefault(stage, set()).add(name)
    return found


def artefacts(kind: str) -> dict[str, list[str]]:
    """The ids of one kind by their function."""
    found: dict[str, list[str]] = {}
    for artefact in Plan(CONFIG, ROOT).study.artefacts:
        if artefact.kind == kind:
            found.setdefault(artefact.function, []).append(artefact.id)
    return found


@pytest.mark.parametrize("study", STUDIES)
def test_no_run_or_measure_hangs_on_a_table_figure_or_verdict(study):
    plan = Plan(CONFIG, ROOT)
    measures = [m for m in plan.study.measures if m.function.startswith(f"papers.{study}.")]
    assert measures
    for function in {m.function for m in measures}:
        modules = plan.code.modules("papers.cli.measure", function)
        assert "papers.cli.measure" in modules
        drawn = [n for n in modules if n.split(".")[-1].split("_")[0] in ("tables", "figures", "verdicts", "style")]
        assert [n for n in drawn if n != "papers.common.tables"] == []
        assert not any(n.startswith("workflow") for n in modules)


def test_training_needs_nothing_of_the_papers():
    modules = Plan(CONFIG, ROOT).code.modules("curvspace.cli.train")
    assert modules
    assert [n for n in modules if n.startswith(("papers", "workflow"))] == []


@pytest.mark.parametrize("study", STUDIES)
def test_an_edited_table_function_redoes_tables_and_claims_alone(study, before, checkout):
    function, ids = next((f, ids) for f, ids in artefacts("table").items() if f.startswith(f"papers.{study}."))
    edited(checkout, *function.split(":"))
    found = stale(before, checkout)
    assert set(ids) <= found["table"]
    assert set(found) <= {"table", "figure", "claims"}


@pytest.mark.parametrize("study", STUDIES)
def test_an_edited_figure_function_redraws_its_figures_alone(study, before, checkout):
    every = artefacts("figure")
    function, ids = next((f, ids) for f, ids in every.items() if f.startswith(f"papers.{study}."))
    edited(checkout, *function.split(":"))
    found = stale(before, checkout)
    assert set(found) == {"figure"}
    assert set(ids) <= found["figure"]
    assert all(id.startswith(next(iter(ids))[0]) for id in found["figure"])


def test_an_edited_optimiser_reruns_its_runs_and_measures(before, checkout):
    edited(checkout, "curvspace.optim.curveball", "CurveBall")
    found = stale(before, checkout)
    kinds = {name for name, block in CONFIG["optimizers"].items() if block["kind"] == "curveball"}
    runs = {run.path for run in Plan(CONFIG, ROOT).study.runs if run.optimizer in kinds}
    assert runs
    assert found["train"] == runs
    assert set(found) <= {"train", "measure"}
    assert all("curveball" in name or name == "c/costs" for name in found.get("measure", ()))


def test_an_edited_command_of_the_pipeline_or_a_document_redoes_nothing(before, checkout):
    for name in ("registry.py", "b/captions.yaml", "b/schema.yaml"):
        with (checkout / "lib" / "papers" / name).open("a") as file:
            file.write("\n# A remark.\n")
    assert stale(before, checkout) == {}
