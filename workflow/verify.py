"""Which results are stale, told from the records beside them alone.

Every job leaves a ``run.json`` with the settings it was given, the hash of the code it ran and the versions of what
it ran on. Here all of them are recomputed from a config and compared, whatever Snakemake remembers: this catches a
lost ``.snakemake`` folder, mixed versions, hand edits and results of another config. Exit status 1 when anything is
stale or missing.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        written = options.config or settings.files([ROOT / "config.yaml", *options.configfile])
        found = list(compare(load(settings.whole(written), ROOT).jobs(), ROOT))
    for state, name, why in found:
        if options.all or state != "current":
            print(f"{state:8} {name}" + (f": {why}" if why else ""))
    counts = Counter(state for state, _, _ in found)
    print(", ".join(f"{counts[state]} {state}" for state in ("current", "stale", "missing")))
    raise SystemExit(0 if counts["current"] == len(found) else 1)


def compare(jobs: Iterator[Any], root: Path = Path()) -> Iterator[tuple[str, str, str]]:
    """(state, stage and name, why) of each job: current, stale or missing."""
    versions: Counter[str] = Counter()
    records = []
    for job in jobs:
        file = root / job.record
        try:
            record = json.loads(file.read_text())
        except FileNotFoundError:
            record = None
        except json.JSONDecodeError:
            record = {}
        records.append((job, record))
        if record:
            versions[_torch(record)] += 1
    usual = versions.most_common(1)[0][0] if versions else ""
    for job, record in records:
        why = _stale(job, record, usual) if record is not None else f"{job.record} is not there"
        state = "missing" if record is None else "stale" if why else "current"
        yield state, f"{job.stage} {job.name}", why


def _stale(job: Any, record: Mapping[str, Any], usual: str) -> str:
    """What no longer fits, empty if all does."""
    reasons = []
    wanted, given = json.loads(job.params["spec"]), record.get("job", {})
    if given != wanted:
        keys = sorted(key for key in {*given, *wanted} if given.get(key) != wanted.get(key))
        reasons.append(f"settings differ in {', '.join(keys)}")
    if record.get("code") != job.code:
        reasons.append("the code has changed")
    if job.stage in ("train", "measure") and _torch(record) != usual:
        reasons.append(f"made with torch {_torch(record)}, most others with {usual}")
    return "; ".join(reasons)


def _torch(record: Mapping[str, Any]) -> str:
    return str(record.get("versions", {}).get("torch"))


if __name__ == "__main__":
    main()
