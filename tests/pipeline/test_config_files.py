"""Broken config files: one line with the file, the line in it and the cause; and values that fit each other."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import seaborn

from curvspace.datasets import obtain
from curvspace.datasets.generated import gaussian_mixture, sine
from curvspace.errors import UserError
from curvspace.models.layers import ACTIVATIONS
from curvspace.training.spec import Task
from papers import registry
from tests.pipeline.conftest import copy
from workflow import checks, config_files, data_facts, job_checks, settings
from workflow.specs import load

ROOT = Path(__file__).parents[2]

BROKEN = {
    "a tab": (b"a: 1\nb:\n\tc: 2\n", ":3: the line begins with a tab"),
    "latin-1": (b"a: 1\nname: caf\xe9\n", ":2: byte 0xe9 is no UTF-8"),
    "utf-16": ("a: 1\n".encode("utf-16"), ":1: byte 0xff is no UTF-8"),
    "a null byte": (b"a: 1\nb: \x00\n", ":2: "),
    "empty": (b"", " is empty"),
    "comments alone": (b"# nothing\n", " is empty"),
    "a list": (b"- a\n- b\n", "has no keys at its top"),
    "a word": (b"hello\n", "has no keys at its top"),
    "an open bracket": (b"a: [1, 2\nb: 3\n", ":2: no YAML"),
    "an open quote": (b"a: 1\nb: 'x\n", ": no YAML"),
    "indentation": (b"a:\n  b: 1\n c: 2\n", ":3: no YAML"),
    "two colons": (b"a: b: c\n", ":1: no YAML"),
    "a key twice": (b"a: 1\nb: {c: 1, d: 2, c: 3}\n", ":2: c stands twice"),
    "a number as a key": (b"models:\n  12: {kind: fc}\n", ":2: 12 is no text"),
    "a truth value as a key": (b"models:\n  on: {kind: fc}\n", ":2: on is no text"),
    "an unknown alias": (b"a: *b\n", ":1: no YAML"),
    "an unknown tag": (b"a: !!python/object:os.system {}\n", ":1: no YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", ":2: no YAML"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_with_its_place(tmp_path, name):
    content, expected = BROKEN[name]
    file = tmp_path / "my.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config_files.read(file)
    said = str(caught.value)
    assert said.startswith(str(file))
    assert expected in said
    assert "\n" not in said


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml is not there"):
        config_files.read(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        config_files.read(tmp_path)


def test_merged_keys_do_not_stand_twice(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert config_files.read(file)["b"] == {"x": 3, "y": 2}


def test_a_preset_is_read_with_care_too(tmp_path):
    """Snakemake reads it first, and would let the last of two equal keys count."""
    project = copy(tmp_path / "project")
    (project.folder / "mine.yaml").write_text("style: {dpi: 90}\nthreads: 1\nstyle: {dpi: 80}\n")
    done = project.snakemake("-n", "--configfile", "mine.yaml")
    assert done.returncode == 1
    assert "mine.yaml:3: style stands twice" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    return settings.whole(settings.files([ROOT / "config.yaml", ROOT / "workflow" / "presets" / "smoke.yaml"]))


CROSS = {
    "more examples than there are": ("datasets.digits.train", 1400, ["datasets.digits.train = 1400", "at most 1042"]),
    "nothing left": ("datasets.digits.validation", 1442, ["digits.validation = 1442", "less than 1442"]),
    "more test examples": ("datasets.digits.test", 400, ["datasets.digits.test = 400", "at most 355"]),
    "no images": ("datasets.sine-1k.resize", 8, ["datasets.sine-1k.resize", "needs images"]),
    "no pixels": ("datasets.sine-1k.normalisation", "whitened", ["datasets.sine-1k.normalisation", "needs images"]),
    "no classes": ("datasets.sine-1k.labels", "even-odd", ["datasets.sine-1k.labels", "needs classes"]),
    "thinned numbers": ("datasets.sine-1k.imbalance", 3, ["datasets.sine-1k.imbalance", "needs classes"]),
    "mse of classes": ("tasks.digits/fc-16x16.loss", "mse", ["tasks.digits/fc-16x16.loss", "cross_entropy"]),
    "classes of numbers": ("tasks.sine-1k/fc-16x16.loss", "cross_entropy", ["tasks.sine-1k/fc-16x16.loss", "mse"]),
    "a crop of numbers": ("tasks.sine-1k/fc-16x16.augment", "crop-flip", ["tasks.sine-1k/fc-16x16.augment", "images"]),
    "a shift as wide as the image": (
        "tasks.digits/fc-16x16",
        {"epochs": 1, "augment": "crop-flip", "augment_padding": 8},
        ["tasks.digits/fc-16x16.augment", "9 pixels a side or more", "1×8×8"],
    ),
    "a step beyond the end": (
        "studies.b.networks.convnet.steps",
        [0, 900],
        ["step 900", "b/trajectory/convnet", "ends"],
    ),
    "a step not saved": ("studies.b.networks.convnet.steps", [0, 7], ["step 7", "tasks.digits-16px/convnet-tiny"]),
    "a start not followed": ("studies.b.networks.fc.starts", [3], ["networks.fc.starts has 3", "allowed: 0, 25"]),
    "a gradient not measured": ("studies.b.gradient_steps", [0, 26], ["gradient_steps has 26", "networks.fc.steps"]),
    "too many dimensions": ("studies.b.dimensions", [500], ["studies.b.dimensions has 500", "at most 20"]),
    "examples measured": ("studies.a.subspace.examples", 5000, ["examples = 5000", "datasets.digits"]),
    "a step of D": ("studies.d.profiles.step", 3, ["measure d/profiles", "step 3"]),
    "an unknown data set": ("studies.d.optimizer.dataset", "digit", ["studies.d.optimizer.dataset", "did you mean"]),
    "an unknown optimiser": ("studies.a.first_order", "sdg", ["studies.a.first_order", "did you mean sgd"]),
    "a reference that is absent": ("studies.tournament.reference", "rmsprop", ["studies.tournament.reference"]),
    "tuned on what is reported": ("studies.tournament.tuning_seeds", [1], ["seed 1 is both"]),
    "tuned in the race": ("studies.race.tuning_seeds", [1], ["studies.race.workloads[0]", "both"]),
    "horizons": ("studies.race.horizons", [1, 0.5], ["horizons = [1, 0.5]", "ascending"]),
    "an estimate": ("studies.d.optimizer.estimate", "adam", ["studies.d.optimizer.estimate"]),
    "a timed network": ("studies.c.timed", "vgg", ["studies.c.timed", "studies.c.networks has no 'vgg'"]),
    "rate of nobody": (
        "studies.c.costs.lr",
        {"default": 0.01, "curvball": 1.0},
        ["curvball", "studies.c.costs.optimizers"],
    ),
    "paths recorded": ("studies.c.small.traced", 10**6, ["studies.c.small.traced", "at most runs"]),
    "a seed twice": ("studies.b.edge.seeds", [0, 0], ["studies.b.edge.seeds", "0"]),
    "a run without end": ("tasks.digits/fc-small.epochs", 1e30, ["tasks.digits/fc-small", "steps", "at most"]),
    "a measure's run without end": ("studies.tournament.stability.epochs", 1e30, ["tournament", "steps", "at most"]),
    "a whole float": ("studies.b.seed", 1.0, ["studies.b.seed = 1.0", "a whole number"]),
    "a huge whole float": ("datasets.digits.train", 1e20, ["datasets.digits.train = 1e+20", "a whole number"]),
    "no section": ("datasets", 5, ["datasets = 5", "a block of keys"]),
    "nothing to measure": ("studies.a.subspace.tolerances", [], ["studies.a.subspace.tolerances", "at least 1"]),
    "huge images": ("datasets.digits.resize", 10**7, ["datasets.digits.resize", "at most 4096"]),
    "infinity": ("studies.a.subspace.lr", float("inf"), ["studies.a.subspace.lr = inf", "finite"]),
    "no number": ("tasks.digits/fc-small.epochs", float("nan"), ["tasks.digits/fc-small.epochs = nan", "finite"]),
    "a huge number": ("threads", 10**30, ["threads = 1000", "4294967295"]),
    "a hint that is a whole number": ("threads", "4", ["threads = '4'", "number: 4"]),
    "no hint that is not allowed": ("threads", "0.5", ["threads = '0.5'", "allowed: a whole number"]),
    "an activation": ("models.fc-16x16.activation", "reluu", ["models.fc-16x16.activation", "softplus"]),
    "a palette": ("style.palette", "colourblind", ["style.palette", "colorblind"]),
    "a module": (
        "models.fc-small",
        {"kind": "no_such_module_x:net"},
        ["models.fc-small", "no module no_such_module_x"],
    ),
    "an optimiser of torch": ("optimizers.adam", {"kind": "torch.optim:NoAdam"}, ["optimizers.adam", "has no NoAdam"]),
    "its option": ("optimizers.adam", {"kind": "torch.optim:NAdam", "beta": 1}, ["optimizers.adam.beta", "betas"]),
    "a base": ("optimizers.centralised.base.momentum", "much", ["optimizers.centralised.base.momentum"]),
}


@pytest.mark.parametrize("name", CROSS)
def test_values_that_do_not_fit_each_other_are_refused(smoke, name):
    place, value, expected = CROSS[name]
    config = deepcopy(smoke)
    *way, last = place.split(".")
    block = config
    for part in way:
        block = block.setdefault(part, {})
    block[last] = value
    with pytest.raises(SystemExit) as stop:
        load(config, ROOT)
    lines = str(stop.value).splitlines()
    assert any(all(part in line for part in expected) for line in lines), lines


def test_facts_of_data_sets_are_those_of_the_arrays():
    blocks = [
        ({"source": "digits"}, obtain.digits()),
        ({"source": "gaussian-mixture", "classes": 3, "dim": 7, "per_class": 4}, gaussian_mixture(3, 7, per_class=4)),
        ({"source": "sine", "examples": 9}, sine(9)),
    ]
    for block, arrays in blocks:
        facts = data_facts.source(block)
        assert facts is not None
        assert (facts.train, facts.test) == (len(arrays.train_targets), len(arrays.test_targets))
        assert (facts.shape, facts.classes) == (arrays.train_inputs.shape[1:], arrays.num_classes)
        assert facts.numbers == (arrays.train_targets.dtype.kind == "f")


@pytest.mark.parametrize("batch", [7, 64, 5000, "full"])
@pytest.mark.parametrize("task", [{"epochs": 2}, {"epochs": 0.3, "min_steps": 9}, {"epochs": 4, "max_steps": 11}])
def test_the_last_step_is_that_of_the_training_loop(task, batch):
    size = 1000 if batch == "full" else min(batch, 1000)
    assert job_checks.last_step(task, 1000, batch) == Task(**task).steps(1000, size)


def test_listed_names_are_those_of_the_libraries():
    schema = checks.schema()
    listed = schema["$defs"]["model"]["else"]["properties"]["activation"]["enum"]
    assert sorted(listed) == sorted(ACTIVATIONS)
    for palette in schema["properties"]["style"]["properties"]["palette"]["enum"]:
        assert len(seaborn.color_palette(palette, 3)) == 3


def test_every_reference_of_the_schema_leads_to_a_section():
    def references(part: Any) -> Any:
        if isinstance(part, dict):
            yield from (value for key, value in part.items() if key == "refers" and isinstance(value, str))
            part = list(part.values())
        if isinstance(part, list):
            for inner in part:
                yield from references(inner)

    found = set(references(registry.schemas()))
    assert {"datasets", "models", "optimizers"} <= found
    for path in found - {"datasets", "models", "optimizers"}:
        study = path.split(".")[1]
        assert path.split(".")[2] in registry.schemas()[study]["properties"], path
