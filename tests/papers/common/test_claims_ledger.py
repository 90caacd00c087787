"""The ledger: claims as data, their binding to a config, and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from curvspace.errors import UserError
from papers import registry
from papers.cli import claims as command
from papers.common import claims as binding
from papers.common import ledger
from papers.common.outcomes import UNTESTED, VERDICTS
from papers.common.study import Artefact, Measure, Run, Study

ENTRY = {
    "id": "Z1",
    "paper": "Z",
    "where": "figure 1",
    "statement": "the value | is high",
    "reference": "0.9",
    "reads": {"measure": "measure:z/*"},
    "rule": "threshold",
    "options": {"at_least": 0.9},
    "requires": {"data": "mnist", "epochs": 2},
    "needs": "MNIST, 2 epochs",
    "figure": "Z-F1",
}
CONFIG = {
    "scale": "smoke",
    "results": "results/smoke",
    "datasets": {"small": {"source": "mnist", "train": 1000}, "digits": {"source": "digits"}},
    "models": {"fc": {"kind": "fc"}},
    "tasks": {"small/fc": {"epochs": 2}, "digits/fc": {"epochs": 1}},
}


def study(dataset: str = "small") -> Study:
    run = Run(dataset, "fc", "sgd", 64, 0.1, 0)
    measure = Measure("z/value", "m:f", (run,))
    return Study(artefacts=[Artefact("Z-F1", "figure", "m:f", {"runs": (run,), "measure": (measure,)})]).close()


def one(tables: dict[str, pd.DataFrame], short: str = "", **changes: object) -> dict:
    (claim,) = ledger.parse([ENTRY | changes])
    return ledger.row(claim, tables, scale="smoke", short=short)


@pytest.mark.parametrize(("value", "verdict"), [(0.95, "holds"), (0.5, "fails")])
def test_row_has_the_verdict_of_its_rule(value: float, verdict: str) -> None:
    found = one({"measure": pd.DataFrame({"seed": [0, 1], "value": [value, value]})})
    assert (found["verdict"], found["value"], found["seeds"], found["needs"]) == (verdict, value, 2, "")


def test_no_table_is_not_tested_and_says_what_it_needs() -> None:
    found = one({})
    assert (found["verdict"], found["needs"]) == (UNTESTED, "MNIST, 2 epochs")


def test_too_small_a_scale_is_not_tested_but_shows_what_was_measured() -> None:
    found = one({"measure": pd.DataFrame({"value": [0.95]})}, short="1 epochs")
    assert (found["verdict"], found["value"]) == (UNTESTED, 0.95)
    assert "1 epochs" in found["needs"]


def test_names_are_put_in_words_as_wholes() -> None:
    words = {"fc": "fully connected network", "mnist-10k": "10,000 examples of MNIST"}
    text = ledger.worded("mnist-10k, fc: 1; mnist-10k-1k, fc-32: 2", words)
    assert text == "10,000 examples of MNIST, fully connected network: 1; mnist-10k-1k, fc-32: 2"


def test_the_number_of_parameters_is_that_of_the_rows_a_claim_is_about() -> None:
    table = pd.DataFrame({"lr": [0.1, 1.0], "value": [1.0, 2.0], "parameters": [500, 700]})
    assert "; 700 parameters" in one({"measure": table}, options={"at_least": 0, "where": {"lr": 1.0}})["scale"]


def test_a_second_table_may_have_no_row_that_a_claim_is_about() -> None:
    tables = {
        name: pd.DataFrame({"lr": [lr], "value": [1.0], "parameters": [500]}) for name, lr in (("a", 1), ("b", 2))
    }
    options = {"at_least": 0.9, "margin": 0.1, "table": "a", "where": {"lr": 1}}
    found = one(tables, reads={"a": "Z-F1", "b": "Z-F2"}, options=options)
    assert found["verdict"] == "holds"
    assert "; 500 parameters" in found["scale"]


def test_rows_that_are_missing_are_not_tested() -> None:
    found = one({"measure": pd.DataFrame({"value": [1.0], "lr": [0.1]})}, options={"at_least": 0, "where": {"lr": 1.0}})
    assert found["verdict"] == UNTESTED
    assert "no row with lr" in found["measured"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "holds"}, "Z1: unknown key 'verdict'"),
        ({"rule": "no_such_rule"}, "no verdict rule 'no_such_rule'"),
        ({"rule": "no.module:f"}, "no verdict rule"),
    ],
)
def test_wrong_entries_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ledger.parse([ENTRY | change])


def test_incomplete_and_double_entries_are_named() -> None:
    with pytest.raises(UserError, match=r"Z1: missing .*needs"):
        ledger.parse([{k: v for k, v in ENTRY.items() if k != "needs"}])
    with pytest.raises(UserError, match="Z1 stands in the file twice"):
        ledger.parse([ENTRY, ENTRY])


def test_binding_finds_tables_scale_and_figure() -> None:
    spec = binding.bind([ENTRY], study(), CONFIG)
    assert spec["sources"] == {"measure:z/*": ["measures/z/value.csv"]}
    assert spec["scale"]["Z1"] == "smoke: fully connected network on 1,000 examples of MNIST, 2 epochs, η = 0.1"
    assert spec["short"] == {}
    assert spec["link"]["Z1"] == "figures/Z-F1.png"


def test_binding_of_each_kind_of_source() -> None:
    sources = {"Z-F1": "figures/Z-F1.csv", "Z-F1:runs": "runs/small/fc/sgd/bs64-lr0.1-seed0/metrics.csv"}
    for source, table in sources.items():
        assert binding.bind([ENTRY | {"reads": {"x": source}}], study(), CONFIG)["sources"] == {source: [table]}
    everything = ["runs/small/fc/sgd/bs64-lr0.1-seed0/metrics.csv", "measures/z/value.csv"]
    assert binding.bind([ENTRY | {"reads": {"x": "Z-F1:*"}}], study(), CONFIG)["sources"] == {"Z-F1:*": everything}
    labelled = binding.bind([ENTRY | {"reads": {"x": "Z-F1[runs]"}}], study(), CONFIG)
    assert labelled["sources"] == {"Z-F1[runs]": ["figures/Z-F1.csv"]}
    assert labelled["models"]["Z1"] == ["fc"]
    (part,) = labelled["parts"]["Z1"].items()
    assert part == ("fully connected network on 1,000 examples of MNIST, 2 epochs, η = 0.1", [("small", "fc")])
    assert labelled["words"]["Z1"] == {"small": "1,000 examples of MNIST", "fc": "fully connected network"}
    uneven = CONFIG | {"datasets": {"small": CONFIG["datasets"]["small"] | {"imbalance": 20}}}
    assert binding.bind([ENTRY | {"reads": {"x": "Z-F1[runs]"}}], study(), uneven)["words"]["Z1"] == {
        "small": "MNIST imbalanced 20 to 1",
        "fc": "fully connected network",
    }
    for absent in ("Z-F2", "Z-F1:other", "measure:y/*"):
        assert binding.bind([ENTRY | {"reads": {"x": absent}}], study(), CONFIG)["sources"] == {}


def test_the_scale_is_that_of_the_rows_a_claim_is_about() -> None:
    runs = tuple(Run("small", "fc", name, 64, lr, 0) for name, lr in (("sgd", 0.1), ("adam", 0.01)))
    race = Measure("z/raced", "m:f", datasets=("other",), spec={"dataset": "other", "optimizer": {"name": "adam"}})
    both = Study(artefacts=[Artefact("Z-F1", "figure", "m:f", {"runs": runs, "raced": (race,)})])
    entry = ENTRY | {"reads": {"x": "Z-F1"}}
    config = CONFIG | {"datasets": CONFIG["datasets"] | {"other": {"source": "cifar10"}}}

    def scale(**where: object) -> str:
        spec = binding.bind([entry | {"options": {"where": where}}], both, config)
        return spec["scale"]["Z1"].removeprefix("smoke: fully connected network on 1,000 examples of MNIST, 2 epochs")

    assert scale() == scale(lr=0.3, optimizer=["sgd", "adam"]) == ", η = 0.01 or 0.1"
    assert scale(optimizer="adam") == ", η = 0.01"
    assert scale(dataset="small", optimizer={"above": 1}) == ", η = 0.01 or 0.1"
    assert scale(dataset="other") == "smoke: generated data"
    assert scale(optimizer="neither") == scale()


def test_binding_says_what_a_scale_lacks() -> None:
    spec = binding.bind([ENTRY], study("digits"), CONFIG)
    assert spec["short"]["Z1"] == "digits instead of mnist, 1 epochs"
    needy = ENTRY | {"requires": {"train": 5000, "seeds": 2, "models": {"fc": {"widths": [9]}, "resnet9": {}}}}
    found = binding.bind([needy], study(), CONFIG)["short"]["Z1"]
    assert found == "1,000 training examples, 1 seeds, no resnet9 of full size"


def test_digits_decide_nothing_beside_the_data_that_a_claim_is_about() -> None:
    runs = tuple(Run(name, "fc", "sgd", 64, 0.1, 0) for name in ("small", "digits"))
    config = CONFIG | {"tasks": {"small/fc": {"epochs": 2}, "digits/fc": {"epochs": 2}}}
    for part, short in ((runs, "digits besides"), (runs[:1], "")):
        both = Study(artefacts=[Artefact("Z-F1", "figure", "m:f", {"runs": part})])
        found = binding.bind([ENTRY | {"reads": {"x": "Z-F1"}}], both, config)["short"]
        assert found.get("Z1", "") == short


def test_seeds_are_those_of_the_setting_with_the_fewest() -> None:
    runs = tuple(
        Run("small", "fc", "sgd", size, 0.1, seed) for size, seeds in ((64, 3), (512, 1)) for seed in range(seeds)
    )
    several = Study(artefacts=[Artefact("Z-F1", "figure", "m:f", {"runs": runs})])
    entry = ENTRY | {"reads": {"x": "Z-F1"}}
    for least, short in ((1, ""), (2, "1 seeds")):
        found = binding.bind([entry | {"requires": {"seeds": least}}], several, CONFIG)["short"]
        assert found.get("Z1", "") == short


def test_a_run_that_is_cut_short_has_fewer_epochs() -> None:
    """1,000 examples in batches of 64: 16 steps an epoch."""
    for steps, short in ((24, "1.5 epochs"), (32, ""), (None, "")):
        cut = CONFIG | {"tasks": {"small/fc": {"epochs": 2, "max_steps": steps}}}
        assert binding.bind([ENTRY], study(), cut)["short"].get("Z1", "") == short


def test_command_writes_csv_markdown_and_html(tmp_path: Path) -> None:
    table = tmp_path / "measures/z/value.csv"
    table.parent.mkdir(parents=True)
    pd.DataFrame({"seed": [0, 1, 2], "value": [0.95, 0.96, 0.97]}).to_csv(table, index=False)
    file = tmp_path / "claims.yaml"
    absent = ENTRY | {"id": "Z2", "reads": {"x": "Z-F9"}}
    file.write_text(yaml.safe_dump([ENTRY, absent]))
    spec = json.dumps(binding.bind([ENTRY, absent], study(), CONFIG))
    command.main(
        ["--spec", spec, "--claims", str(file), "--results", str(tmp_path), "--out", str(tmp_path / "claims.csv")]
    )
    written = pd.read_csv(tmp_path / "claims.csv")
    assert tuple(written.columns) == ledger.COLUMNS
    assert written["verdict"].tolist() == ["holds", UNTESTED]
    assert "2 claims: 1 holds" in (tmp_path / "claims.md").read_text()
    assert r"the value \| is high" in (tmp_path / "claims.md").read_text()
    assert 'href="figures/Z-F1.png"' in (tmp_path / "claims.html").read_text()
    assert json.loads((tmp_path / "claims.run.json").read_text())["versions"]["pandas"]


def test_broken_yaml_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "claims.yaml").write_text("- id: [")
    with pytest.raises(SystemExit):
        command.main(
            ["--spec", '{"sources": {}}', "--claims", str(tmp_path / "claims.yaml"), "--out", str(tmp_path / "c")]
        )
    assert capsys.readouterr().err.count("\n") == 1


def test_a_claim_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.yaml", "two.yaml")]
    for file in files:
        file.write_text(yaml.safe_dump([ENTRY]))
    with pytest.raises(UserError, match=r"claim Z1 stands in two files, .*two\.yaml being the second"):
        ledger.load(files)


def test_a_bare_rule_is_looked_up_beside_the_claims_first() -> None:
    (claim,) = ledger.parse([ENTRY | {"rule": "crossover"}], "papers.a.verdicts")
    assert claim.rule == "papers.a.verdicts:crossover"
    with pytest.raises(UserError, match="no verdict rule 'crossover'"):
        ledger.parse([ENTRY | {"rule": "crossover"}], "papers.b.verdicts")


SHIPPED = ledger.load(registry.claim_files().values())


def test_shipped_claims_are_the_whole_list() -> None:
    wanted = [*_numbered("A", 12), *_numbered("B", 18), *_numbered("C", 25), *_numbered("D", 8), *_numbered("X", 16)]
    assert [claim.id for claim in SHIPPED] == wanted


@pytest.mark.parametrize("claim", SHIPPED, ids=lambda claim: claim.id)
def test_shipped_claim_says_all_that_a_reader_needs(claim: ledger.Claim) -> None:
    assert claim.paper == claim.id[0]
    assert all([claim.where, claim.statement, claim.reference, claim.needs, claim.figure])
    assert len(" ".join(claim.statement.split())) > 30


def test_counts_cover_all_verdicts() -> None:
    rows = [{"verdict": verdict} for verdict in VERDICTS]
    assert ledger.counts(ledger.table(rows)) == dict.fromkeys(VERDICTS, 1)


def _numbered(letter: str, count: int) -> list[str]:
    return [f"{letter}{i}" for i in range(1, count + 1)]


def test_one_entry_stands_for_the_cells_of_a_published_table(tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text("cells: {a: {mean: 3, sd: 0.5}, b: {mean: 40, sd: 2}}")
    entry = ENTRY | {
        "id": "Z{number}",
        "each": {"solver": [{"solver": "a", "words": "Method A"}, {"solver": "b", "words": "Method B"}]},
        "published": "cells/{solver}",
        "statement": "{words} takes {mean} ± {sd} iterations",
        "options": {"at_least": "{mean}", "where": {"solver": "{solver}"}},
    }
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([entry, ENTRY | {"id": "Z3"}]))
    first, second, third = ledger.load([tmp_path / "claims.yaml"])
    assert (first.id, second.id, third.id) == ("Z1", "Z2", "Z3")
    assert second.statement == "Method B takes 40 ± 2 iterations"
    assert first.options == {"at_least": 3, "where": {"solver": "a"}}


def test_one_claim_reads_the_papers_numbers_from_any_depth(tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text("sums: [{value: 0.20}, {value: 0.94}]\nbest: {cosine: 0.36}")
    deep = {"id": "Z1", "published": "/", "statement": "{sums[0][value]:.2f}, then {sums[1][value]}"}
    alone = {"id": "Z2", "published": "best", "options": {"around": "{cosine}", "tolerance": 0.1}}
    plain = {"id": "Z3", "statement": "as {it} stands"}
    written = [ENTRY | part for part in (deep, alone, plain)]
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(written))
    first, second, third = ledger.load([tmp_path / "claims.yaml"])
    assert first.statement == "0.20, then 0.94"
    assert second.options == {"around": 0.36, "tolerance": 0.1}
    assert third.statement == "as {it} stands"
