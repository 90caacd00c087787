"""A Slurm of one node for tests: ``python tests/cluster/one_node.py start``, and ``stop``.

Needs root and Debian's packages (``apt-get install slurm-wlm munge``); no systemd, no control groups, no database. All
lies in one folder (``--folder``), but for two links in /etc/slurm, without which the steps of Snakemake's executor find
no configuration: it takes Slurm's variables out of their environment. A machine that has a Slurm of its own is left
alone.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ETC = Path("/etc/slurm")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
DEFAULT = Path(tempfile.gettempdir()) / "one-node-slurm"

CONFIGURATION = """
ClusterName=one
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={next_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge={min_job_age}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
GresTypes=gpu
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""


def missing() -> str:
    """Why there can be no such Slurm here; empty where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "a Slurm of one node needs root"
    if absent:
        return f"no {', '.join(absent)} here (Debian: apt-get install slurm-wlm munge)"
    foreign = [file for file in (ETC / "slurm.conf", ETC / "gres.conf") if file.exists() and not file.is_symlink()]
    return f"this machine has a Slurm of its own: {foreign[0]}" if foreign else ""


def start(folder: Path, *, gpus: int = 2, cpus: int = 4, min_job_age: int = 300, port: int = 17917) -> None:
    """Start it and wait until its node takes jobs. The GPUs are names alone: links to /dev/null."""
    if why := missing():
        raise SystemExit(why)
    for name in ("state", "spool", "devices", "munge"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    if not key.exists():
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
    for index in range(gpus):
        device = folder / "devices" / f"gpu{index}"
        if not device.is_symlink():
            device.symlink_to("/dev/null")
    node = socket.gethostname().partition(".")[0]
    memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.9 / 2**20)
    values = {"node": node, "folder": folder, "port": port, "next_port": port + 1, "cpus": cpus, "memory": memory}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values, gpus=gpus, min_job_age=min_job_age))
    devices = f"{folder}/devices/gpu[0-{gpus - 1}]" if gpus > 1 else f"{folder}/devices/gpu0"
    (folder / "gres.conf").write_text(f"NodeName={node} Name=gpu File={devices}\n" if gpus else "")
    ETC.mkdir(exist_ok=True)
    for name in ("slurm.conf", "gres.conf"):
        (ETC / name).unlink(missing_ok=True)
        (ETC / name).symlink_to(folder / name)
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge/seed"]
    for command in (["munged", "--force", *munge], ["slurmctld"], ["slurmd", "-N", node]):
        subprocess.run(command, check=True)
    for _ in range(300):
        if state() in ("idle", "mixed", "allocated"):
            return
        time.sleep(0.2)
    raise SystemExit(f"the node takes no jobs; see {folder}/slurmctld.log and {folder}/slurmd.log")


def state() -> str:
    """What the node is: idle, mixed, allocated, down."""
    answer = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False).stdout
    return answer.strip().rstrip("*")


def stop(folder: Path) -> None:
    """End its jobs and its programs, by the numbers that they left, and take the links away."""
    if (folder / "slurmctld.pid").exists():
        subprocess.run(["scancel", "--quiet", "--user=root"], check=False, timeout=20)
    for name in ("slurmd", "slurmctld", "munged"):
        end(folder / f"{name}.pid", name)
    for name in ("slurm.conf", "gres.conf"):
        if (ETC / name).is_symlink() and os.readlink(ETC / name) == str(folder / name):
            (ETC / name).unlink()


def end(pid_file: Path, name: str, number: int = signal.SIGTERM) -> None:
    """End the program that wrote the file, if it still is that program."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == name:
            os.kill(pid, number)
            for _ in range(100):
                if not Path(f"/proc/{pid}").exists():
                    break
                time.sleep(0.1)
    pid_file.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--folder", type=Path, default=DEFAULT)
    parser.add_argument("--gpus", type=int, default=2, help="how many GPUs it pretends to have")
    parser.add_argument("--min-job-age", type=int, default=300, help="seconds for which squeue knows a finished job")
    options = parser.parse_args()
    if options.action == "start":
        start(options.folder.resolve(), gpus=options.gpus, min_job_age=options.min_job_age)
    else:
        stop(options.folder.resolve())


if __name__ == "__main__":
    main()
