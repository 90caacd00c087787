"""What this machine and its scheduler offer, asked before the first job and without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from itertools import takewhile
from pathlib import Path

REMEMBERED_S = 200
"""Snakemake's Slurm executor asks for the state of its jobs every three minutes at most."""


def gpus(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """How many GPUs a job of this machine sees; 1 where they cannot be counted without their driver."""
    environment = os.environ if environment is None else environment
    found = sum(1 for path in devices.glob("nvidia[0-9]*"))
    if not found:
        found = int(any((devices / name).exists() for name in ("kfd", "dxg")))
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if not found or named is None:
        return found
    names = (name.strip() for name in named.split(","))
    return sum(1 for _ in takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names))  # CUDA stops at any other too


def wants_gpu(device: str) -> bool:
    """Whether jobs are to ask for a GPU; of ``auto`` also by the torch that is installed (``make … TORCH=cpu``)."""
    if device != "auto":
        return device != "cpu"
    try:
        return gpus() > 0 and not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return gpus() > 0


def without_gpu(device: str, here: bool) -> tuple[str, bool]:
    """(What to say, whether to stop) before jobs run on this machine (``here``) or on a cluster, if it has no GPU."""
    if gpus():
        return "", False
    if here and device.startswith("cuda"):
        line = f"config: device = {device!r}, but this machine has no GPU; run it on one that has, send the jobs to a"
        return f"{line} cluster (--profile workflow/profiles/slurm), or compute on CPUs: --config device=cpu", True
    if not here and device == "auto":
        line = "config: device = 'auto' and this machine has no GPU, so no job asks the cluster for one and all compute"
        return f"{line} on CPUs; if GPUs are wanted: --config device=cuda", False
    return "", False


def forgetful_slurm() -> str:
    """What to say if finished jobs may be forgotten here before Snakemake has asked for them; empty if not.

    ``squeue`` knows a finished job for MinJobAge seconds, ``sacct`` for ever where there is a database behind it. A
    job that neither knows any more is waited for without end.
    """
    told = re.search(r"^MinJobAge\s*=\s*(\d+)", _says("scontrol", "show", "config") or "", re.M)
    if not told or int(told[1]) >= REMEMBERED_S or _says("sacct", "-X", "-n") is not None:
        return ""
    return (
        f"this Slurm forgets a finished job after {told[1]} s (MinJobAge) and keeps no accounts; jobs could be waited"
        " for without end: use --profile workflow/profiles/cluster-generic"
    )


def _says(*command: str) -> str | None:
    """What a program prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
