"""A copy of the pipeline with a study of a few jobs, in which files can be edited and the rerun looked at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINI = Path(__file__).parent / "mini"


class Project:
    """A checkout in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment, check=False)

    def planned(self, *arguments: str) -> dict[str, list[str]]:
        """Jobs that Snakemake would run: name -> outputs. A run's name is optimiser, model and learning rate."""
        done = self.snakemake("-n", *arguments)
        assert done.returncode == 0, done.stderr
        jobs = {}
        for rule, body in re.findall(r"^(?:local)?rule (\w+):\n((?:    .*\n)+)", done.stdout + done.stderr, re.M):
            outputs = re.search(r"output: (.*)", body)
            paths = outputs[1].split(", ") if outputs else []
            jobs[_name(rule, paths)] = paths
        jobs.pop("all", None)
        return jobs

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.folder / path
        text = file.read_text()
        assert text.count(old) >= 1, f"{old!r} is not in {path}"
        file.write_text(text.replace(old, new, 1))


def _name(rule: str, outputs: list[str]) -> str:
    run = re.search(r"runs/\w+/([^/]+)/([^/]+)/bs\w+-lr([^/]+)-seed", outputs[0]) if outputs else None
    return "train {1} {0} {2}".format(*run.groups()) if run and rule == "train" else rule


def copy(to: Path) -> Project:
    """Snakefile, workflow and library of this checkout, with the study ``mini`` alone."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("workflow", "lib", "envs"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    shutil.copy(ROOT / "Snakefile", to)
    shutil.copytree(MINI, to / "lib" / "papers" / "mini", ignore=ignore)
    shutil.move(to / "lib" / "papers" / "mini" / "config.yaml", to / "config.yaml")
    return Project(to)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project all of whose jobs Snakemake believes to be done: empty outputs, recorded by ``--touch``."""
    project = copy(tmp_path_factory.mktemp("finished") / "project")
    for paths in project.planned().values():
        for path in paths:
            target = project.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.mkdir() if target.name == "checkpoints" else target.touch()
    touched = project.snakemake("--touch", "--forceall")
    assert touched.returncode == 0, touched.stderr
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of its own of the finished project."""
    shutil.copytree(finished.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")
