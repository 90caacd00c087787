"""The config checks: every wrong value is one line which names the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import papers
from papers.common import study
from papers.common.study import StudyError
from workflow import checks, settings
from workflow.specs import Plan, load

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests" / "pipeline" / "mini"


@pytest.fixture
def text() -> str:
    return "scale: default\n" + (MINI / "config.yaml").read_text()


@pytest.fixture(autouse=True)
def _mini(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests' study beside the repository's own; its functions are not part of the library."""
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(MINI.parent)])
    checks.schema.cache_clear()
    monkeypatch.setattr(Plan, "artefact", lambda self, artefact: None)
    monkeypatch.setattr(Plan, "measure", lambda self, measure: None)
    yield
    checks.schema.cache_clear()


def said(text: str) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        load(yaml.safe_load(text), ROOT)
    return str(stop.value).splitlines()


def test_a_right_config_makes_a_plan(text):
    plan = load(yaml.safe_load(text), ROOT)
    assert len(plan.study.runs) == 5


WRONG = {
    "sixteen bits for curvature": (
        "epochs: 2",
        "epochs: 2, precision: bfloat16",
        ["tasks.digits/small", "precision: bfloat16", "first-order", "curveball"],
    ),
    "a precision": ("epochs: 2", "epochs: 2, precision: float16", ["tasks.digits/small.precision", "bfloat16"]),
    "compile with a word": ("epochs: 2", "epochs: 2, compile: yes please", ["tasks.digits/small.compile", "true"]),
    "a memory format": ("epochs: 2", "epochs: 2, memory_format: nhwc", ["digits/small.memory_format", "channels-last"]),
    "a number that YAML reads as text": ("lrs: [0.1, 0.01]", "lrs: [1e-1, 0.01]", ["studies.mini.lrs[0]", "0.1"]),
    "a negative number": ("epochs: 2", "epochs: -2", ["tasks.digits/small.epochs", "-2", "greater than 0"]),
    "a misspelt key": ("threads: 1", "thread: 1", ["thread is not a known key", "did you mean threads"]),
    "a missing key": ("device: cpu\n", "", ["device is missing", "auto"]),
    "a device": ("device: cpu", "device: gpu", ["device = 'gpu'", "auto", "cpu", "cuda"]),
    "an optimiser's option": ("momentum: 0.9", "momentun: 0.9", ["optimizers.sgd.momentun", "did you mean momentum"]),
    "an option's range": ("momentum: 0.9", "momentum: 1.9", ["optimizers.sgd.momentum", "1.9", "less than 1"]),
    "a kind": ("kind: curveball", "kind: curvebal", ["optimizers.curveball.kind", "curvebal", "curveball, "]),
    "a model's option": (
        "widths: [8]",
        "width: 8",
        ["models.small.width", "allowed: activation, bias, initialisation, widths"],
    ),
    "an optimiser that no block describes": ("[sgd, curveball]", "[sgd, adam]", ["optimizers has no 'adam'", "sgd"]),
    "a run without a task": ("  digits/conv: {epochs: 1}\n", "", ["tasks has no 'digits/conv'"]),
    "an unknown source of data": ("source: digits", "source: digit", ["datasets.digits.source", "digits"]),
    "a function that is not there": (
        "kind: cnn-400",
        "kind: 'curvspace.models.resnet9:resnet99'",
        ["resnet9.py has no resnet99"],
    ),
    "a task of a network that is not there": (
        "digits/conv: {epochs: 1}",
        "digits/conv: {epochs: 1}\n  digits/cnv: {epochs: 1}",
        ["tasks.digits/cnv", "models has no 'cnv'", "did you mean conv"],
    ),
    "a block that is no block": ("style: {dpi: 100}", "style: 3", ["style = 3", "a block of keys"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_one_line(text, name):
    old, new, expected = WRONG[name]
    assert old in text
    lines = said(text.replace(old, new, 1))
    assert len(lines) == 1
    assert lines[0].startswith("config: ")
    assert all(part in lines[0] for part in expected), lines[0]


def test_no_minibatch_is_larger_than_the_training_set(text):
    lines = said(text.replace("train: 1000", "train: 50"))
    rest = "batch size = 64 is not allowed; allowed: at most 50, which datasets.digits has for training, or full"
    assert lines == [f"config: runs of digits/conv: {rest}", f"config: runs of digits/small: {rest}"]


def test_several_wrong_values_are_a_line_each(text):
    lines = said(text.replace("threads: 1", "threads: 0").replace("dpi: 100", "dpi: 1"))
    assert [line.split()[1] for line in lines] == ["style.dpi", "threads"]


@pytest.mark.parametrize("preset", [[], ["smoke"], ["paper"]])
def test_presets_are_right(preset):
    files = [ROOT / "config.yaml", *(ROOT / "workflow" / "presets" / f"{name}.yaml" for name in preset)]
    plan = load(settings.whole(settings.files(files)), ROOT)
    assert plan.study.artefacts


def test_every_key_of_the_schema_is_described():
    def undescribed(part, path):
        if not isinstance(part, dict):
            return
        for name, inner in part.get("properties", {}).items():
            target = inner
            if isinstance(inner, dict) and "$ref" in inner and "description" not in inner:
                target = definitions[inner["$ref"].rpartition("/")[2]]
            if isinstance(target, dict) and "description" not in target:
                yield f"{path}.{name}"
            yield from undescribed(inner, f"{path}.{name}")
        for key in ("items", "additionalProperties", "then"):
            yield from undescribed(part.get(key), path)
        for inner in (*part.get("allOf", []), *part.get("anyOf", []), *part.get("oneOf", [])):
            yield from undescribed(inner, path)

    schema = checks.schema()
    definitions = schema["$defs"]
    parts = {"": schema, **{f"$defs.{name}": part for name, part in definitions.items()}}
    assert [key for path, part in parts.items() for key in undescribed(part, path)] == []


def test_two_declarations_of_one_name_are_refused():
    first = study.Measure("x", "module:f", spec={"k": 1})
    second = study.Measure("x", "module:f", spec={"k": 2})
    with pytest.raises(StudyError, match="two different declarations of x"):
        study.Study(measures=[first, second]).close()
    assert study.Study(measures=[first, first]).close().measures == [first]


@pytest.mark.parametrize(
    ("value", "written"), [(0.1, "0.1"), (1, "1"), (1.0, "1"), (1e-5, "1e-05"), (0.1234567, "0.1234567")]
)
def test_a_number_in_a_path_reads_back(value, written):
    assert study.number_text(value) == written
    assert float(written) == value


@pytest.mark.parametrize("old", ["eigenpairs", "eigenvalues"])
def test_the_old_name_of_the_number_of_eigenpairs_is_refused_with_the_new_one(old):
    changed = settings.laid_over(yaml.safe_load((ROOT / "config.yaml").read_text()))
    assert checks.problems(changed) == []
    changed["studies"]["b"][old] = changed["studies"]["b"].pop("k")
    assert any(
        line.startswith(f"studies.b.{old} is not a known key; did you mean k?") for line in checks.problems(changed)
    )
