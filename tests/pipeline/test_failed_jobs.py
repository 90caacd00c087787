"""What plain ``snakemake`` says of jobs that failed: one line each, whatever their logs hold."""

from __future__ import annotations

import pytest

from workflow import screen

TOLD = "curvspace train: KeyError: 'width', at nets.py:12 (build)"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (f"Traceback (most recent call last):\n  File x\nKeyError: 'width'\n{TOLD}\n", TOLD),
        (f"run:  3%|###\rrun:  4%|####\r{TOLD}\n\n", TOLD),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'width'\n", "KeyError: 'width'"),
        ("", "ended without a word: killed (no memory, a time limit), or it could not write its log"),
        (None, "ended without a word: killed"),
        ("step 3\rstep 4\r", "GB are free); last: step 4"),
    ],
)
def test_a_failed_job_is_one_line_with_the_place_of_its_log(tmp_path, log, said):
    file = tmp_path / "logs" / "train" / "a run.log"
    if log is not None:
        file.parent.mkdir(parents=True)
        file.write_text(log)
    error = f"Error in rule train:\n    jobid: 3\n    log: {file} (check log file(s) for error details)\n    shell:\n"
    (tmp_path / "snakemake.log").write_text(error + "\n" + error)  # tried twice
    title, line, place = screen.at_error([str(tmp_path / "snakemake.log")]).split("\n")
    assert title == "curvspace: failed"
    assert said in line
    assert place == f"    all of it: {file}"


def test_several_jobs_and_none(tmp_path):
    (tmp_path / "snakemake.log").write_text("nothing of a job\n")
    assert "Snakemake says above" in screen.at_error(str(tmp_path / "snakemake.log"))
    assert "Snakemake says above" in screen.at_error([])
    both = "".join(f"    log: {tmp_path}/{name} (check log file(s) for error details)\n" for name in "ab")
    (tmp_path / "snakemake.log").write_text(both)
    (tmp_path / "a").write_text("curvspace figure: one\n")
    (tmp_path / "b").write_text("curvspace table: two\n")
    said = screen.at_error(str(tmp_path / "snakemake.log"))
    assert [line.strip() for line in said.split("\n")[1::2]] == ["curvspace figure: one", "curvspace table: two"]


def test_plain_snakemake_ends_with_the_users_line(project):
    """The place of the figure's fault stands on the screen, its traceback in the log, and the exit status is not 0."""
    project.edit(
        "lib/papers/mini/figures.py", "def losses(tables, style):\n", "def losses(tables, style):\n    1 / 0\n"
    )
    done = project.snakemake("results/figures/M-F1.csv")
    assert done.returncode != 0
    log = project.folder / "results" / "logs" / "figures" / "M-F1.log"
    assert log.read_text().startswith("Traceback")
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("curvspace figure: ")
    assert f"curvspace: failed\n  {last}\n    all of it: results/logs/figures/M-F1.log" in done.stderr
    assert "Traceback" not in done.stderr
