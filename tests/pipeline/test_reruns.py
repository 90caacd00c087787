"""What an edit reruns: exactly what it invalidates."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import conftest
import pytest
from conftest import ROOT


def train(model: str, optimizer: str, *lrs: float) -> set[str]:
    return {f"train digits/{model}/{optimizer}, batch 64, learning rate {lr}, seed 0" for lr in lrs}


SGD = train("small", "sgd", 0.1, 0.01)
CURVEBALL = train("small", "curveball", 0.1, 0.01)
CONV = train("conv", "sgd", 0.1)
FROM_RUNS = {"figure M-F1", "table M-T1"}
FROM_MEASURE = {"figure M-F2"}
MEASURE = {"measure mini/spectrum"}
TRAINING = SGD | CURVEBALL | CONV
DOWNSTREAM = FROM_RUNS | MEASURE | FROM_MEASURE
ALL_OF_SGD = SGD | CONV | DOWNSTREAM

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


def forget(project) -> None:
    """Snakemake's memory is gone."""
    shutil.rmtree(project.folder / ".snakemake")


def clean(project) -> None:
    """What `make clean` removes."""
    recipe = (ROOT / "Makefile").read_text().partition("\nclean:")[2].partition("\n\n")[0].replace("\t", "")
    assert recipe.strip()
    subprocess.run(["bash", "-ec", recipe.partition("\n")[2]], cwd=project.folder, check=True)


def back_again(project) -> None:
    """A setting is changed, the figure is drawn, the setting is changed back; Snakemake remembers nothing of it."""
    project.edit("config.yaml", "dpi: 100", "dpi: 200")
    assert project.planned() == {"figure M-F1", "figure M-F2"}
    project.python(conftest.RECORDS, "figure")
    project.edit("config.yaml", "dpi: 200", "dpi: 100")
    forget(project)


def copied(*options: str, memory: bool = True) -> Edit:
    """Work goes on in a copy that `cp` made with these options."""

    def edit(project) -> None:
        folder = project.folder.with_name("copy")
        subprocess.run(["cp", *options, str(project.folder), str(folder)], check=True)
        project.folder = folder
        if not memory:
            forget(project)

    return edit


def commits(project) -> None:
    """Another commit, with other code, and back."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]

    def run(*arguments: str) -> None:
        subprocess.run([*git, *arguments], cwd=project.folder, check=True, capture_output=True)

    run("init", "-q", "-b", "first")
    run("add", "Snakefile", "config.yaml", "lib", "workflow", "envs")
    run("commit", "-qm", "first")
    run("checkout", "-qb", "second")
    append("lib/curvspace/training/loop.py", "\nLIMIT = 1\n")(project)
    run("commit", "-qam", "second")
    assert project.planned() == TRAINING | DOWNSTREAM
    run("checkout", "-q", "first")


def momentum(project) -> None:
    project.edit("config.yaml", "momentum: 0.9", "momentum: 0.8")


CASES: dict[str, tuple[Edit, set[str]]] = {
    "nothing": (lambda project: None, set()),
    "a learning rate": (
        replace("config.yaml", "lrs: [0.1, 0.01]", "lrs: [0.1, 0.02]"),
        train("small", "sgd", 0.02) | train("small", "curveball", 0.02) | FROM_RUNS,
    ),
    "an optimiser's setting": (
        replace("config.yaml", "momentum: 0.9", "momentum: 0.8"),
        ALL_OF_SGD,
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
        train("small", "adam", 0.1, 0.01) | FROM_RUNS,
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
        {"figure M-F1", "figure M-F2"},
    ),
    "another function of the measure's module": (
        replace("lib/papers/mini/measures.py", "return context\n", "return None\n"),
        set(),
    ),
    "the style": (replace("config.yaml", "dpi: 100", "dpi: 200"), {"figure M-F1", "figure M-F2"}),
    "the threads": (replace("config.yaml", "threads: 1", "threads: 2"), set()),
    "a new export of a package": (
        replace("lib/curvspace/optim/__init__.py", '"FirstOrder"', '"FirstOrder", "Other"'),
        set(),
    ),
    "dates alone": (
        touch("lib/**/*.py", "workflow/**/*.py", "config.yaml", "results/runs/**/*.csv", "data/digits/*"),
        set(),
    ),
    "nothing, when Snakemake's memory is lost": (forget, set()),
    "nothing, after another commit and back": (commits, set()),
    "nothing, after another commit and back without memory": (
        lambda project: (commits(project), forget(project)),
        set(),
    ),
    "nothing, in a copy (cp -a)": (copied("-a"), set()),
    "nothing, in a copy (cp -a) without memory": (copied("-a", memory=False), set()),
    "a setting, when Snakemake's memory is lost": (lambda project: (forget(project), momentum(project)), ALL_OF_SGD),
    "nothing, after make clean": (clean, set()),
    "a setting, after make clean": (lambda project: (clean(project), momentum(project)), ALL_OF_SGD),
    "a setting and back, when Snakemake's memory is lost": (back_again, {"figure M-F1", "figure M-F2"}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_edit_reruns_exactly_what_it_invalidates(project, name):
    edit, expected = CASES[name]
    edit(project)
    assert project.planned() == expected


def test_everything_is_planned_in_a_fresh_checkout(finished):
    assert finished.planned("--forceall") == TRAINING | DOWNSTREAM | {"data digits", "claims"}
