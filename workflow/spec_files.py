"""Each job's spec and code hash as a file, which is an input of the job.

A file has no limit of length, and nothing in it reaches a shell. Its name holds a digest of its content, so that a
plan of another config leaves the files of running jobs alone; a change of the spec or code changes the set of the
job's inputs, and Snakemake runs the job again. Where Snakemake has lost its memory it compares dates alone. So a file
is dated long ago where the record beside the job's outputs says the same, and later than the record where it does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvspace.files import writing

if TYPE_CHECKING:
    from workflow.specs import Job

LONG_AGO = 1e9
"""A date (2001) before that of any output."""


def canonical(value: Any) -> str:
    """One string for a value, whatever the order of its keys; which key holds which value counts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def of_job(job: Job, folder: str) -> str:
    """The file of a job, below ``folder/.specs`` as its record is below ``folder``; old only if the record fits it."""
    place = os.path.relpath(job.record, folder).removesuffix("run.json").rstrip("./")
    path = write(f"{folder}/.specs/{place}", canonical({"job": job.spec, "code": job.code}))
    record = Path(job.record)
    if record.exists():
        date = os.stat(path).st_mtime
        if fits(job, record):
            if date != LONG_AGO:
                os.utime(path, (LONG_AGO, LONG_AGO))
        elif date <= (made := record.stat().st_mtime):
            later = max(time.time(), made + 1)  # a clock may have been set back since, or be a file server's
            os.utime(path, (later, later))
    return path


def write(folder: str, text: str) -> str:
    """The path ``{folder}/{digest}.json`` of a file with this text.

    A folder for each job: Snakemake remembers what it once saw in a folder, and would miss a file of the next job's.
    """
    path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with writing(path):
        if not path.exists() or path.stat().st_size != len(text.encode()):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
    return str(path)


def fits(job: Job, record: Path) -> bool:
    """Whether a record says that its outputs are of this spec and code."""
    try:
        told: Any = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(told, dict) or told.get("code") != job.code:
        return False
    return canonical(told.get("job")) == canonical(job.spec)
