"""A copy of the pipeline with a study of a few jobs, in which files can be edited and the rerun looked at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from workflow import specs

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

    def planned(self, *arguments: str) -> set[str]:
        """Jobs that Snakemake would run, by their message; a run's says all that its path does."""
        done = self.snakemake("-n", *arguments)
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"^Job \d+: (.+)$", done.stdout + done.stderr, re.M))

    def python(self, code: str, *arguments: str) -> str:
        """What a program prints that imports this checkout's code."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), str(self.folder / "lib")])}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.folder / path
        text = file.read_text()
        assert text.count(old) >= 1, f"{old!r} is not in {path}"
        file.write_text(text.replace(old, new, 1))


def copy(to: Path) -> Project:
    """Snakefile, workflow and library of this checkout, with the study ``mini`` alone."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("workflow", "lib", "envs"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    shutil.copy(ROOT / "Snakefile", to)
    shutil.copytree(MINI, to / "lib" / "papers" / "mini", ignore=ignore)
    shutil.move(to / "lib" / "papers" / "mini" / "config.yaml", to / "config.yaml")
    return Project(to)


RECORDS = """
import sys
from pathlib import Path
from curvspace.cli.common import provenance
from curvspace.files import write_record
from workflow import settings, specs
for job in specs.load(settings.whole(settings.files([Path("config.yaml")])), Path().resolve()).jobs():
    if job.stage in sys.argv[1:]:
        write_record(Path(job.record), provenance(job.spec, job.code))
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project all of whose jobs are done, as their records and Snakemake believe; all other outputs are empty."""
    project = copy(tmp_path_factory.mktemp("finished") / "project")
    summary = project.snakemake("--summary")
    assert summary.returncode == 0, summary.stderr
    for path in re.findall(r"^(\S+)\t", summary.stdout, re.M)[1:]:
        target = project.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir() if target.name == "checkpoints" else target.touch()
    project.python(RECORDS, "data", "train", "measure", "figure", "table", "claims")
    touched = project.snakemake("--touch", "--forceall")
    assert touched.returncode == 0, touched.stderr
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of its own of the finished project."""
    shutil.copytree(finished.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


READ_ONCE = cache(specs.Code)


@pytest.fixture
def code_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of this checkout, whose code no test edits, share what was read of it: seconds each."""
    monkeypatch.setattr(specs, "Code", READ_ONCE)
