"""The workflow from a folder that is not its own: a new study end to end, as a module, and what the screen says."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from curvspace.cli import new_study
from curvspace.cli.app import app
from curvspace.errors import UserError
from workflow import screen

ROOT = Path(__file__).parents[2]


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the environment's programs on PATH: Snakemake is called by its own path."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    environment = {**os.environ, "PATH": os.defpath}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def test_a_new_study_runs_end_to_end_in_a_folder_with_an_odd_name(tmp_path):
    folder = tmp_path / "l'été à deux" / "spirals"
    done = CliRunner().invoke(app, ["new-study", "spirals", "--out", str(folder)])
    assert done.exit_code == 0, done.output
    assert "NAME" not in "".join(file.read_text() for file in folder.rglob("*") if file.is_file())
    settings = folder / "papers/spirals/settings/default.yaml"
    settings.write_text(settings.read_text().replace("epochs: 20", "epochs: 1").replace("seeds: [0, 1]", "seeds: [0]"))
    usual = ("-s", str(ROOT / "Snakefile"), "--configfile", "study.yaml")
    ran = snakemake(folder, *usual)
    assert ran.returncode == 0, ran.stderr
    assert "2 train" in ran.stderr
    assert "results/figures" in ran.stderr.rpartition("curvspace: done")[2]
    assert (folder / "results/figures/spirals-F1.png").stat().st_size > 5000
    assert (folder / "results/claims.html").is_file()
    record = json.loads((folder / "results/runs/spirals/network/dropped/bs100-lr0.1-seed0/run.json").read_text())
    assert record["status"] == "finished"
    verified = snakemake(folder, *usual, "--", "verify")
    assert "5 current, 0 stale, 0 missing" in verified.stdout, verified.stdout + verified.stderr
    twin = tmp_path / "copy"  # new dates, and nothing that Snakemake remembers
    shutil.copytree(folder, twin, copy_function=shutil.copy, ignore=shutil.ignore_patterns(".snakemake"))
    verified = snakemake(twin, *usual, "--", "verify")
    assert "5 current, 0 stale, 0 missing" in verified.stdout, verified.stdout + verified.stderr
    optimiser = folder / "optimiser.py"  # code of the user's own is watched like ours
    optimiser.write_text(
        optimiser.read_text().replace("num_classes=num_classes,", "num_classes=num_classes, gain=0.5,")
    )
    planned = snakemake(folder, *usual, "-n").stdout
    assert "train spirals/network/dropped" in planned
    assert "train spirals/network/sgd" not in planned


def test_it_is_a_module_of_another_workflow(tmp_path):
    text = f"""
module curvspace:
    snakefile: {str(ROOT / "workflow" / "Snakefile")!r}
    config: {{"scale": "smoke", "studies": ["c"], "results": "out"}}

use rule * from curvspace as curvspace_*
"""
    (tmp_path / "Snakefile").write_text(text)
    planned = snakemake(tmp_path, "-n", "out/figures/C-F1.png")
    assert planned.returncode == 0, planned.stderr
    assert "figure C-F1" in planned.stdout


@pytest.mark.parametrize("name", ["Mine", "1st", "my-study", "papers", "a", "common", "../x"])
def test_a_name_that_cannot_be_a_study_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="name"):
        new_study.make(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="is there already"):
        new_study.make("mine", tmp_path)


def job(rule: str, benchmark: Path | None) -> SimpleNamespace:
    return SimpleNamespace(rule=SimpleNamespace(name=rule), benchmark=benchmark)


def took(folder: Path, run: str, seconds: float) -> Path:
    """The benchmark file of a training run."""
    path = folder / "benchmarks" / "train" / f"{run}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\tmax_rss\n{seconds}\t-\n")
    return path


def test_the_start_says_how_much_there_is_and_how_long_it_took_before(tmp_path):
    first, second = took(tmp_path, "a/b/one", 100), took(tmp_path, "a/c/two", 200)
    new = tmp_path / "benchmarks/train/new.tsv"
    said = screen.at_start([job("train", first), job("train", new), job("all", None)], str(tmp_path))
    assert "2 train; about 4 minutes" in said  # its own 100 s, and 150 s as the mean of the rule
    assert screen.expected_seconds([("train", str(second))], str(tmp_path)) == (200, [])
    unknown = screen.at_start([job("measure", tmp_path / "benchmarks/measures/x.tsv")], str(tmp_path))
    assert "1 measure; no times recorded yet" in unknown
    partly = screen.at_start([job("train", first), job("measure", tmp_path / "new.tsv")], str(tmp_path))
    assert "1 train, 1 measure; about 2 minutes" in partly
    assert partly.endswith("; not timed yet: measure")
    assert "nothing to compute" in screen.at_start([], str(tmp_path))


def test_the_time_left_goes_by_what_the_jobs_took(tmp_path):
    done = [job("train", took(tmp_path, "one", 100)), job("train", took(tmp_path, "two", 200))]
    slow, new = job("train", took(tmp_path, "three", 1200)), job("train", tmp_path / "benchmarks/train/four.tsv")
    said = screen.time_left([slow], done, elapsed=150, results=str(tmp_path))  # two at a time
    assert said == "curvspace: 1 jobs left, about 10 min"
    said = screen.time_left([new], done, elapsed=150, results=str(tmp_path))  # the mean, 500 s
    assert said == "curvspace: 1 jobs left, about 4 min"
    unknown = job("measure", tmp_path / "benchmarks/measures/x.tsv")
    said = screen.time_left([unknown], done, elapsed=600, results=str(tmp_path))  # by their number
    assert said == "curvspace: 1 jobs left, about 5 min"


def test_progress_tells_the_time_left_at_most_twice_a_minute(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 10.0, 40.0, 50.0, 71.0])
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(clock))
    jobs = [job("train", tmp_path / f"benchmarks/train/{i}.tsv") for i in range(4)]
    dag = SimpleNamespace(needrun_jobs=lambda exclude_finished: iter(jobs), finished=lambda one: one in jobs[:2])
    handler = screen.TimeLeft(dag, str(tmp_path))
    progress = logging.makeLogRecord({"event": SimpleNamespace(name="PROGRESS"), "done": 2, "total": 4})
    for _ in range(4):
        handler.emit(progress)
    assert capsys.readouterr().err.splitlines() == ["curvspace: 2 jobs left, about 1 min"] * 2


def test_the_end_names_what_is_there(tmp_path):
    (tmp_path / "figures").mkdir()
    assert str(tmp_path / "figures") in screen.at_end(str(tmp_path))
    assert "tables" not in screen.at_end(str(tmp_path)).replace(str(tmp_path), "")
