"""Prints running, success or failed for a Slurm job: what Snakemake's cluster-generic executor asks for.

A job that ended by itself has left its exit status in logs/cluster. One that left none runs, waits, or was killed: it
is in the queue or it is not. So finished jobs may be forgotten by Slurm as soon as it likes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

LIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
LIVE |= {"REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "SPECIAL_EXIT"}
PATIENCE_S = 60


def state(job: str) -> str:
    """running, success or failed. A scheduler that does not answer is no failure of the job."""
    left = Path("logs/cluster") / f"{job}.exit"
    for _ in range(3):  # a file may reach this machine later than the queue's answer
        command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        except FileNotFoundError:  # there is no such scheduler here
            raise
        except (OSError, subprocess.TimeoutExpired):  # no process free, no answer; Snakemake would end at an error
            return "running"
        unknown = "Invalid job id" in asked.stderr
        if asked.returncode and not unknown:
            return "running"
        if set(asked.stdout.split()) & LIVE:
            return "running"
        if left.exists() and (text := left.read_text().strip()):
            return "success" if text == "0" else "failed"
        time.sleep(1)
    return "failed"


if __name__ == "__main__":
    print(state(sys.argv[1]))
