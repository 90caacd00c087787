"""A study through a real Slurm of one node ends in the tables of a local run, whatever befalls its jobs."""

from __future__ import annotations

import fcntl
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import one_node
import pandas as pd
import pytest

from tests.pipeline.conftest import Project, copy

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("results/figures/M-F1.csv", "results/tables/M-T1.csv")
PROFILES = {
    "slurm": ("--slurm-init-seconds-before-status-checks", "5"),
    "cluster-generic": ("--seconds-between-status-checks", "3"),
}
PATIENCE_S = 3600
OTHERS_MIN = 20
"""What the rules of figures and tables ask for."""
HEADS: list[subprocess.Popen[bytes]] = []

pytestmark = pytest.mark.skipif(bool(one_node.missing()), reason=one_node.missing())


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm; that of ``one_node.py start`` if it runs already. One at a time on a machine: other tests wait."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    with (Path(tempfile.gettempdir()) / "one-node-slurm.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if one_node.state():
            yield
            return
        folder = tmp_path_factory.mktemp("slurm")
        try:
            one_node.start(folder)
            yield
        finally:
            one_node.stop(folder)


def study(folder: Path, epochs: int = 2, lrs: str = "[0.1]", runtime: int = 30) -> Project:
    project = copy(folder)
    project.edit("config.yaml", "[sgd, curveball], lrs: [0.1, 0.01]", f"[sgd], lrs: {lrs}")
    project.edit("config.yaml", "epochs: 2", f"epochs: {epochs}")
    with (folder / "config.yaml").open("a") as file:
        file.write(f"resources: {{train: {{mem_mb: 1000, runtime: {runtime}}}}}\n")
    return project


def begin(project: Project, profile: str, *options: str) -> subprocess.Popen[bytes]:
    """Snakemake on the cluster, in the background; what it says goes to the file ``head.log``."""
    command = [sys.executable, "-m", "snakemake", "--profile", f"workflow/profiles/{profile}", "--latency-wait", "10"]
    command += [*PROFILES[profile], *options, *TARGETS]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (project.folder / "head.log").open("a") as log:
        head = subprocess.Popen(command, cwd=project.folder, stdout=log, stderr=log, env=environment)
    HEADS.append(head)
    return head


@pytest.fixture(autouse=True)
def no_head_is_left() -> Iterator[None]:
    """A test that fails leaves no Snakemake behind, whose jobs would hold the node."""
    yield
    while HEADS:
        head = HEADS.pop()
        if head.poll() is None:
            head.terminate()
            head.wait(PATIENCE_S)


def wait(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.5)


def ended(project: Project, head: subprocess.Popen[bytes]) -> None:
    assert head.wait(PATIENCE_S) == 0, (project.folder / "head.log").read_text()[-5000:]


def tables(project: Project) -> list[str]:
    """The final tables without their columns of seconds."""
    found = []
    for name in TARGETS:
        table = pd.read_csv(io.StringIO((project.folder / name).read_text()), dtype=str)
        found.append(table.drop(columns=["wall_s", "seconds"], errors="ignore").to_csv(index=False))
    return found


def local(folder: Path, **settings: object) -> list[str]:
    project = study(folder, **settings)  # type: ignore[arg-type]
    done = project.snakemake(*TARGETS)
    assert done.returncode == 0, done.stderr[-3000:]
    return tables(project)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tables of a local run."""
    return local(tmp_path_factory.mktemp("local") / "project")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_study_through_a_cluster_equals_a_local_one(slurm, short, tmp_path, profile):
    pytest.importorskip(f"snakemake_executor_plugin_{profile.replace('-', '_')}")
    project = study(tmp_path / "cluster")
    ended(project, begin(project, profile))
    assert tables(project) == short


ALLOCATION = ["sbatch", "--wait", "--cpus-per-task", "2", "--mem", "8G", "--time", "60", "--output", "allocation.log"]
"""One job of Slurm for a whole study, in which Snakemake runs as on any machine."""


@pytest.mark.slurm
def test_figures_of_papers_a_and_b_through_slurm_equal_a_local_run(slurm, tmp_path):
    """The smoke preset's A-F1 and B-F1, from the repository as it is: each job to Slurm, and all in one allocation."""
    figures = [f"results/figures/{name}.csv" for name in ("A-F1", "B-F1")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for place, how, within in (
        ("local", ["--cores", "1"], []),
        ("slurm", ["--profile", str(ROOT / "workflow/profiles/slurm"), *PROFILES["slurm"]], []),
        ("allocation", ["--cores", "2"], ALLOCATION),
    ):
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), *how]
        command += ["--configfile", str(ROOT / "workflow/presets/smoke.yaml")]
        command += ["--config", "results=results", "device=cpu", "threads=1", "--", *figures]
        (tmp_path / place).mkdir()
        if within:
            command = [*within, "--wrap", shlex.join(command)]
        done = subprocess.run(command, cwd=tmp_path / place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-5000:]
    for name in figures:
        alone = (tmp_path / "local" / name).read_bytes()
        assert (tmp_path / "slurm" / name).read_bytes() == alone
        assert (tmp_path / "allocation" / name).read_bytes() == alone


# What may befall a run. Each takes minutes.

LONG = 400
"""Epochs of a run that is still going on when something befalls it: half a minute on an idle core."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return local(tmp_path_factory.mktemp("local") / "project", epochs=LONG)


def training(project: Project) -> tuple[int, str]:
    """(Process, Slurm's job) of the run that a project trains now; (0, "") before."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes().split(b"\0")
            if b"curvspace.cli.train" in words and os.path.samefile(proc / "cwd", project.folder):
                held = any((project.folder / "results" / ".state").rglob("lock"))
                given = dict(word.partition("=")[::2] for word in (proc / "environ").read_text().split("\0"))
                if words[0].endswith(b"python") and held:
                    return int(proc.name), given["SLURM_JOB_ID"]
        except OSError:
            continue
    return 0, ""


def cancel(project: Project, head: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    subprocess.run(["scancel", training(project)[1]], check=True)
    return head


def kill_the_job(project: Project, head: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    os.kill(training(project)[0], signal.SIGKILL)
    return head


def kill_the_head(project: Project, head: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    head.kill()
    head.wait()
    assert training(project)[0], "the job should go on"
    assert project.snakemake("--unlock").returncode == 0
    profile = "cluster-generic" if "cluster-generic" in str(head.args) else "slurm"
    return begin(project, profile)


def lose_the_node(project: Project, head: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    node = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
    update = ["scontrol", "update", f"nodename={node}"]
    subprocess.run([*update, "state=down", "reason=test"], check=True)
    wait(lambda: not training(project)[0], "the job's end with its node")
    if one_node.state() == "down":  # it may have come back by itself
        subprocess.run([*update, "state=resume"], check=False)
    wait(lambda: one_node.state() in ("idle", "mixed", "allocated"), "the node's return")
    return head


DISTURBANCES = {
    "scancel": cancel,
    "kill -9 of the job": kill_the_job,
    "kill -9 of Snakemake": kill_the_head,
    "node down and resumed": lose_the_node,
}


@pytest.mark.slurm
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbed_study_ends_in_the_tables_of_an_undisturbed_one(slurm, undisturbed, tmp_path, profile, name):
    project = study(tmp_path / "cluster", epochs=LONG)
    head = begin(project, profile)
    wait(lambda: training(project)[0] or head.poll() is not None, "the first run")
    ended(project, DISTURBANCES[name](project, head))
    assert tables(project) == undisturbed


def limits(project: Project) -> list[int]:
    """Minutes that Slurm gave the project's trainings, by its own record, in the order in which they ended."""
    told = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    (record,) = re.findall(r"^JobCompLoc\s*=\s*(\S+)", told, re.M)
    ended = [line for line in Path(record).read_text().splitlines() if f"WorkDir={project.folder} " in line]
    given = [int(minutes) for line in ended for minutes in re.findall(r"TimeLimit=(\d+)", line)]
    return [minutes for minutes in given if minutes < OTHERS_MIN]


@pytest.mark.slurm
def test_a_time_limit_is_doubled_and_the_run_goes_on_where_it_was(slurm, tmp_path):
    project = study(tmp_path / "cluster", epochs=12000, runtime=1)
    ended(project, begin(project, "slurm", "--retries", "5"))  # 63 minutes in all; an idle machine needs two of them
    assert "TIMEOUT" in (project.folder / "head.log").read_text()
    assert limits(project)[:2] == [1, 2]
    assert tables(project) == local(tmp_path / "local", epochs=12000)


@pytest.mark.slurm
def test_an_error_of_its_own_is_said_and_not_computed_again(slurm, tmp_path):
    project = study(tmp_path / "cluster")
    project.edit("config.yaml", "kind: sgd, momentum: 0.9", 'kind: "broken:make"')
    (project.folder / "lib" / "broken.py").write_text(
        "def make(*args, **options):\n"
        "    open('calls', 'a').write('x')\n"
        "    raise ArithmeticError('no such optimiser')\n"
    )
    head = begin(project, "slurm")
    assert head.wait(PATIENCE_S) == 1
    log = (project.folder / "head.log").read_text()
    assert "ArithmeticError: no such optimiser" in log, "the failed log is shown"
    assert (project.folder / "calls").read_text() == "x"
