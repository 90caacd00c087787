"""What an edit reruns: exactly what it invalidates."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SGD = {"train sgd small 0.1", "train sgd small 0.01"}
CURVEBALL = {"train curveball small 0.1", "train curveball small 0.01"}
CONV = {"train sgd conv 0.1"}
FROM_RUNS = {"figure_M_F1", "table_M_T1"}
FROM_MEASURE = {"figure_M_F2"}
MEASURE = {"measure_mini_spectrum"}
TRAINING = SGD | CURVEBALL | CONV
DOWNSTREAM = FROM_RUNS | MEASURE | FROM_MEASURE

Edit = Callable[..., None]


def replace(path: str, old: str, new: str) -> Edit:
    return lambda project: project.edit(path, old, new)


def append(path: str, text: str) -> Edit:
    def edit(project) -> None:
        with (project.folder / path).open("a") as file:
            file.write(text)

    return edit


def touch(*paths: str) -> Edit:
    def edit(project) -> None:
        for path in paths:
            files = list(project.folder.glob(path))
            assert files
            for file in files:
                file.touch()

    return edit


def lose_provenance(project) -> None:
    """The same edit as a change of momentum, after Snakemake's memory is gone: it sees nothing."""
    import shutil

    shutil.rmtree(project.folder / ".snakemake")
    project.edit("config.yaml", "momentum: 0.9", "momentum: 0.8")


CASES: dict[str, tuple[Edit, set[str]]] = {
    "nothing": (lambda project: None, set()),
    "a learning rate": (
        replace("config.yaml", "lrs: [0.1, 0.01]", "lrs: [0.1, 0.02]"),
        {"train sgd small 0.02", "train curveball small 0.02"} | FROM_RUNS,
    ),
    "an optimiser's setting": (
        replace("config.yaml", "momentum: 0.9", "momentum: 0.8"),
        SGD | CONV | DOWNSTREAM,
    ),
    "the order of keys": (replace("config.yaml", "{kind: sgd, momentum: 0.9}", "{momentum: 0.9, kind: sgd}"), set()),
    "a setting of one task": (replace("config.yaml", "epochs: 2", "epochs: 3"), SGD | CURVEBALL | FROM_RUNS),
    "a new optimiser in the config": (
        replace("config.yaml", "optimizers:\n", "optimizers:\n  adam: {kind: adam}\n"),
        set(),
    ),
    "a new optimiser in the study": (
        lambda project: (
            project.edit("config.yaml", "optimizers:\n", "optimizers:\n  adam: {kind: adam}\n"),
            project.edit("config.yaml", "[sgd, curveball]", "[sgd, curveball, adam]"),
        ),
        {"train adam small 0.1", "train adam small 0.01"} | FROM_RUNS,
    ),
    "the training loop": (append("lib/curvspace/training/loop.py", "\nLIMIT = 1\n"), TRAINING | DOWNSTREAM),
    "one optimiser's module": (append("lib/curvspace/optim/curveball.py", "\nLIMIT = 1\n"), CURVEBALL | FROM_RUNS),
    "one model's module": (append("lib/curvspace/models/small_cnn.py", "\nLIMIT = 1\n"), CONV | MEASURE | FROM_MEASURE),
    "a module that only the measure imports": (
        append("lib/curvspace/subspace.py", "\nLIMIT = 1\n"),
        MEASURE | FROM_MEASURE,
    ),
    "comments, docstrings and blank lines": (
        lambda project: (
            append("lib/curvspace/training/loop.py", "\n\n# A remark.\n")(project),
            replace("lib/papers/mini/figures.py", '"""Two figures', '"""A pair of figures')(project),
        ),
        set(),
    ),
    "one figure's function": (
        replace("lib/papers/mini/figures.py", "axvline(WIDTH)", "axvline(WIDTH, color='red')"),
        FROM_MEASURE,
    ),
    "a constant of one figure": (replace("lib/papers/mini/figures.py", "WIDTH = 2.0", "WIDTH = 3.0"), FROM_MEASURE),
    "a helper of both figures": (
        replace("lib/papers/mini/figures.py", '["train_loss"])', '["train_loss"], "o")'),
        {"figure_M_F1", "figure_M_F2"},
    ),
    "another function of the measure's module": (
        replace("lib/papers/mini/measures.py", "return context\n", "return None\n"),
        set(),
    ),
    "the style": (replace("config.yaml", "dpi: 100", "dpi: 200"), {"figure_M_F1", "figure_M_F2"}),
    "the threads": (replace("config.yaml", "threads: 1", "threads: 2"), set()),
    "a new export of a package": (
        replace("lib/curvspace/optim/__init__.py", '"FirstOrder"', '"FirstOrder", "Other"'),
        set(),
    ),
    "dates alone": (
        touch("lib/**/*.py", "workflow/**/*.py", "config.yaml", "results/runs/**/*.csv", "data/digits/*"),
        set(),
    ),
    "a setting, when Snakemake's memory is lost": (lose_provenance, set()),
}


@pytest.mark.parametrize("name", CASES)
def test_an_edit_reruns_exactly_what_it_invalidates(project, name):
    edit, expected = CASES[name]
    edit(project)
    assert set(project.planned()) == expected


def test_everything_is_planned_in_a_fresh_checkout(finished):
    assert set(finished.planned("--forceall")) == TRAINING | DOWNSTREAM | {"data", "claims"}
