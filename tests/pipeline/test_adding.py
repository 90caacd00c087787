"""What CONTRIBUTING says of adding things: each done in a copy of the repository, and its result made.

All of it is one run of Snakemake, in a checkout whose path has what a shell, Snakemake and Python read as their own.
"""

from __future__ import annotations

import json

import pandas as pd
import pytest
from conftest import Project, copy

ODD = "a {b} 'c\" é $HOME; #~ * [d] %s & e"
RESULTS = "my résults/x; y & z"

OPTIMISER = """
import torch


class Halved(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr / 2)
"""
DATA = """
import numpy as np
from curvspace.datasets.store import Arrays


def two_moons(n):
    draws = np.random.default_rng(0).normal(size=(n, 4)).astype("float32")
    labels = (draws[:, 0] > 0).astype("int64")
    return Arrays(draws, labels, draws, labels, 2)
"""
FIGURE = """

def accuracies(tables, style):
    figure, axes = style.panels()
    axes[0, 0].plot(tables["runs"]["step"], tables["runs"]["val_accuracy"])
    return figure, tables["runs"]
"""
MEASURE = """

def count_runs(context):
    return pd.DataFrame({"step": [0], "train_loss": [float(len(context.runs))]})
"""
CLAIM = """
- id: M1
  paper: M
  where: "table 1"
  statement: "The best run ends below a loss of one hundred."
  reference: "below 100"
  needs: "nothing"
  reads: {table: "M-T1"}
  rule: threshold
  options: {column: train_loss, at_most: 100.0}
"""


def add(project: Project, path: str, text: str) -> None:
    """Append to a file of the copy, or make it."""
    file = project.folder / path
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A fifth paper (the folder ``mini`` and its block of the config), to which one of each kind is added."""
    project = copy(tmp_path_factory.mktemp("adding") / ODD)
    project.edit("config.yaml", "results: results", f"results: {RESULTS}")
    # an optimiser: one file, one line of the config
    add(project, "lib/curvspace/optim/halved.py", OPTIMISER)
    project.edit("config.yaml", "optimizers:\n", 'optimizers:\n  halved: {kind: "curvspace.optim.halved:Halved"}\n')
    # a data set of one's own: a module, one line of the config (and how long a network is trained on it)
    add(project, "my_data.py", DATA)
    project.edit("config.yaml", "datasets:\n", 'datasets:\n  moons: {source: "my_data:two_moons", n: 64}\n')
    project.edit("config.yaml", "tasks:\n", "tasks:\n  moons/small: {epochs: 1}\n")
    # a figure on existing tables: two places in one folder
    add(project, "lib/papers/mini/figures.py", FIGURE)
    entry = 'Artefact("M-F3", "figure", "papers.mini.figures:accuracies", {"runs": tuple(runs)}, paper="M"),'
    project.edit("lib/papers/mini/study.py", "artefacts=[\n", f"artefacts=[\n            {entry}\n")
    # a measure with its figure: one folder
    add(project, "lib/papers/mini/measures.py", MEASURE)
    measure = 'Measure("mini/count", "papers.mini.measures:count_runs", (conv,))'
    entry = f'Artefact("M-F4", "figure", "papers.mini.figures:spectrum", {{"measure": {measure}}}, paper="M"),'
    project.edit("lib/papers/mini/study.py", "artefacts=[\n", f"artefacts=[\n            {entry}\n")
    # a claim: one entry of the folder's file
    add(project, "lib/papers/mini/claims.yaml", CLAIM)
    # a picture on the report's front page: one line of the folder's file
    add(project, "lib/papers/mini/front.yaml", '- {question: "What is counted?", figure: M-F4, claims: [M1]}\n')
    own = f"{RESULTS}/runs/moons/small/halved/bs16-lr0.5-seed0/metrics.csv"
    made = project.snakemake("--show-failed-logs", "all", own)
    assert made.returncode == 0, (made.stdout + made.stderr)[-6000:]
    return project


def test_a_fifth_paper_is_one_folder_and_a_block_of_the_config(done):
    results = done.folder / RESULTS
    for id in ("M-F1", "M-F2"):
        assert (results / "figures" / f"{id}.png").stat().st_size > 1000
    assert len(pd.read_csv(results / "tables" / "M-T1.csv")) == 1


def test_an_optimiser_and_a_data_set_are_a_file_and_a_line(done):
    run = done.folder / RESULTS / "runs" / "moons" / "small" / "halved" / "bs16-lr0.5-seed0"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert pd.read_csv(run / "metrics.csv")["dataset"].unique() == ["moons"]


def test_a_figure_and_a_measure_with_its_figure_are_places_in_one_folder(done):
    results = done.folder / RESULTS
    assert pd.read_csv(results / "figures" / "M-F3.csv")["val_accuracy"].notna().any()
    assert pd.read_csv(results / "figures" / "M-F4.csv")["train_loss"].tolist() == [1.0]


def test_a_claim_is_one_entry(done):
    claims = pd.read_csv(done.folder / RESULTS / "claims.csv").set_index("id")
    assert claims.loc["M1", "verdict"] in ("holds", "inconclusive")


def test_in_an_odd_place_nothing_escapes_and_nothing_is_left_to_do(done):
    assert done.planned() == set()
    assert sorted(path.name for path in done.folder.parent.iterdir()) == [done.folder.name]
    verified = done.snakemake("verify", "--quiet", "all")
    assert verified.returncode == 0, verified.stdout[-2000:]
    report = done.snakemake("--report", "report.html")
    assert report.returncode == 0, report.stderr[-2000:]
    page = (done.folder / "report.html").read_text()
    assert "The loss of all runs." in page
    assert "M-F4" in page
    assert all(name in page for name in ("Findings", "Statements, judged"))  # first and last: the report sorts them


def test_the_front_page_has_the_picture_and_the_claim(done):
    page = (done.folder / RESULTS / "front.html").read_text()
    assert "What is counted?" in page
    assert "data:image/png;base64," in page
    assert 'href="claims.html#M1"' in page


def test_rules_are_one_a_stage(done):
    drawn = done.snakemake("--rulegraph")
    assert drawn.returncode == 0
    names = {line.split('"')[1] for line in drawn.stdout.splitlines() if "label" in line and "style" in line}
    assert names == {"all", "data", "train", "measure", "figure", "table", "claims", "front"}
