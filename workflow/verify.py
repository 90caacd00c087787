"""Which results are stale, told from the records beside them alone.

Every job leaves a ``run.json`` with the settings it was given, the hash of the code it ran, the versions of what it ran
on and the SHA-256 of each of its outputs, and of the tables and checkpoints that it read. Here all of them are
recomputed from a config and the files themselves and compared, whatever Snakemake remembers. Results and data are
looked for where it is called. This catches a lost ``.snakemake`` folder, mixed versions, hand edits, damaged and
deleted files, results made from earlier ones, and results of another config. Exit status 1 when anything is stale or
missing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from curvspace import files
from curvspace.cli import common
from workflow import settings
from workflow.specs import load

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m workflow.verify", description=__doc__)
    parser.add_argument(
        "--config", type=common.json_object, help="the whole config as JSON; else it is read from files"
    )
    parser.add_argument("--configfile", type=Path, nargs="*", default=[], help="presets laid over config.yaml")
    parser.add_argument("--all", action="store_true", help="list the results that are up to date too")
    options = parser.parse_args(arguments)
    with common.one_line_errors("verify"):
        written = options.config or settings.based(settings.files(options.configfile), ROOT)
        found = list(compare(load(settings.whole(written), ROOT).jobs()))
    for state, name, why in found:
        if options.all or state != "current":
            common.tell(f"{state:8} {name}" + (f": {why}" if why else ""))
    counts = Counter(state for state, _, _ in found)
    common.tell(", ".join(f"{counts[state]} {state}" for state in ("current", "stale", "missing")))
    raise SystemExit(0 if counts["current"] == len(found) else 1)


def compare(jobs: Iterator[Any], root: Path = Path()) -> Iterator[tuple[str, str, str]]:
    """(state, stage and name, why) of each job: current, stale or missing."""
    versions: Counter[str] = Counter()
    records = []
    for job in jobs:
        record, damage = _read(root / job.record)
        records.append((job, record, damage))
        if record:
            versions[_torch(record)] += 1
    now = {root / job.record: (record or {}).get("outputs") for job, record, _ in records}
    usual = versions.most_common(1)[0][0] if versions else ""
    for job, record, damage in records:
        if record is None:
            why = f"{job.record} is not there"
        else:
            file = root / job.record
            reasons = [damage, *_differences(job, record, usual), *_damaged_outputs(file, record)]
            reasons += _made_anew(file, record, now)
            why = "; ".join(reason for reason in reasons if reason)
        state = "missing" if record is None else "stale" if why else "current"
        yield state, f"{job.stage} {job.name}", why


def _read(file: Path) -> tuple[dict[str, Any] | None, str]:
    """(What a record says, what is wrong with it): None where there is none, empty where it cannot be read."""
    try:
        return files.read_record(file), ""
    except FileNotFoundError:
        return None, ""
    except files.DamagedFile:
        pass
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return {}, "its record is damaged"
    return record, "its record was altered" if files.CHECKSUM in record else "an earlier version wrote its record"


def _differences(job: Any, record: Mapping[str, Any], usual: str) -> Iterator[str]:
    """What no longer fits between a job as it would run now and as it ran."""
    if not record:
        return
    wanted, given = json.loads(job.params["spec"]), record.get("job") or {}
    if given != wanted:
        keys = sorted(key for key in {*given, *wanted} if given.get(key) != wanted.get(key))
        yield f"settings differ in {', '.join(keys)}"
    if record.get("code") != job.code:
        yield "the code has changed"
    if job.stage in ("train", "measure") and _torch(record) != usual:
        yield f"made with torch {_torch(record)}, most others with {usual}"


def _damaged_outputs(file: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """What is no longer as the job left it, three files at most."""
    outputs = record.get("outputs")
    if not record:
        return
    if not isinstance(outputs, dict):
        yield "its record lists no outputs"
    else:
        found = files.differing(file.parent, outputs)
        yield from found[:3]
        if len(found) > 3:
            yield f"and {len(found) - 3} more files"


def _made_anew(file: Path, record: Mapping[str, Any], now: Mapping[Path, Any]) -> Iterator[str]:
    """The first of what a result was made from that has been made anew since, as the records (``now``) tell."""
    for name, digest in (record.get("made_from") or {}).items():
        source = Path(os.path.normpath(file.parent / name))
        for own in (source.with_suffix(".run.json"), source.parent / "run.json", source.parents[1] / "run.json"):
            listed = now.get(own)
            if isinstance(listed, dict) and listed.get(source.relative_to(own.parent).as_posix(), digest) != digest:
                yield f"{source} has been made anew since"
                return


def _torch(record: Mapping[str, Any]) -> str:
    return str((record.get("versions") or {}).get("torch"))


if __name__ == "__main__":
    main()
