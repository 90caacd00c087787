"""What a person reads at the start and at the end of a run: how much there is to do, where results are, what failed."""

from __future__ import annotations

import csv
import logging
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any


def at_start(jobs: Iterable[Any], results: str) -> str:
    """How many jobs of each rule there are, and how long they take together if earlier ones are a guide."""
    jobs = list(jobs)
    counts = Counter(job.rule.name for job in jobs if job.benchmark)  # all rules that compute something
    what = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not counts:
        return "curvspace: nothing to compute"
    seconds, untimed = expected_seconds(
        [(job.rule.name, _file(job)) for job in jobs if job.rule.name in counts], results
    )
    if len(untimed) == len(counts):
        return f"curvspace: {what}; no times recorded yet in {results}/benchmarks"
    minutes = max(1, round(seconds / 60))
    said = f"about {minutes} minutes of work by recorded times, shared by the cores"
    return f"curvspace: {what}; {said}" + (f"; not timed yet: {', '.join(untimed)}" if untimed else "")


class TimeLeft(logging.Handler):
    """Tells the time left whenever Snakemake reports progress, at most twice a minute.

    The jobs that are done took ``elapsed``; those that are open take as much longer as their recorded times, or where a
    rule has none yet their number, are larger.
    """

    EVERY = 30.0

    def __init__(self, dag: Any, results: str):
        super().__init__()
        self.dag, self.results = dag, results
        self.start = self.said = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if getattr(getattr(record, "event", None), "name", "") != "PROGRESS" or now - self.said < self.EVERY:
            return
        self.said = now
        jobs = [job for job in self.dag.needrun_jobs(exclude_finished=False) if job.benchmark]
        done, waiting = ([job for job in jobs if self.dag.finished(job) == ended] for ended in (True, False))
        print(time_left(waiting, done, now - self.start, self.results), file=sys.stderr, flush=True)


def time_left(waiting: list[Any], done: list[Any], elapsed: float, results: str) -> str:
    """How long the waiting jobs take if they go on as those that are done did."""
    if not done or not waiting:
        return f"curvspace: {len(waiting)} jobs left"
    (open_s, untimed), (done_s, _) = (
        expected_seconds([(job.rule.name, _file(job)) for job in part], results) for part in (waiting, done)
    )
    ratio = open_s / done_s if done_s and not untimed else len(waiting) / len(done)
    return f"curvspace: {len(waiting)} jobs left, about {max(1, round(elapsed * ratio / 60))} min"


def expected_seconds(jobs: Iterable[tuple[str, str]], results: str) -> tuple[float, list[str]]:
    """Sum over (rule, benchmark file) of the job's own last time, else the mean of its rule; and the rules without any.

    Snakemake keeps the times of the last run of each job in its benchmark file, in seconds.
    """
    means: dict[str, float | None] = {}
    total, untimed = 0.0, dict[str, None]()
    for rule, file in jobs:
        own = _seconds(Path(file)) if file else 0.0
        if own is None and rule not in means:
            known = [_seconds(found) for found in sorted(Path(results).glob(_pattern(rule)))]
            times = [seconds for seconds in known if seconds is not None]
            means[rule] = fmean(times) if times else None
        own = means[rule] if own is None else own
        if own is None:
            untimed[rule] = None
        total += own or 0.0
    return total, list(untimed)


def at_end(results: str) -> str:
    """Where to look, of what is there."""
    places = {
        "front page": Path(results, "front.html"),
        "figures": Path(results, "figures"),
        "tables": Path(results, "tables"),
        "ledger of claims": Path(results, "claims.html"),
    }
    lines = [f"  {name:17} {place}" for name, place in places.items() if place.exists()]
    lines.append("  one page of all   the same command with --report report.html (make report)")
    return "\n".join(["curvspace: done", *lines])


def at_error(snakemake_logs: str | Iterable[str]) -> str:
    """One line for each job that failed, as the end of its log has it; the logs are named in Snakemake's own."""
    files = [snakemake_logs] if isinstance(snakemake_logs, str) else snakemake_logs
    said = "".join(Path(file).read_text("utf-8", "replace") for file in files if Path(file).is_file())
    named = re.findall(r"^ +log: (.+) \(check log file\(s\) for error details\)$", said, re.M)
    logs = list(dict.fromkeys(log for names in named for log in names.split(", ")))
    if not logs:
        return "curvspace: stopped; what Snakemake says above is all that is known"
    return "\n".join(["curvspace: failed", *(f"  {_end_of(Path(log))}\n    all of it: {log}" for log in logs)])


def _end_of(log: Path) -> str:
    """The last line of a job's log; where its command did not come to tell its end, that."""
    try:
        text = log.read_text("utf-8", "replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    if lines and (lines[-1].startswith("curvspace ") or any(line.startswith("Traceback") for line in lines)):
        return lines[-1]
    free = shutil.disk_usage(next(folder for folder in log.absolute().parents if folder.is_dir())).free
    why = f"killed (no memory, a time limit), or it could not write its log ({free / 1e9:.1f} GB are free)"
    return f"ended without a word: {why}" + (f"; last: {lines[-1]}" if lines else "")


def _file(job: Any) -> str:
    return str(job.benchmark or "")


def _pattern(rule: str) -> str:
    return (
        f"benchmarks/{rule}.tsv"
        if rule in ("claims", "front")
        else f"benchmarks/{rule}{'' if rule == 'train' else 's'}/**/*.tsv"
    )


def _seconds(file: Path) -> float | None:
    """Mean of the column ``s`` of a benchmark file; None where it is missing or unreadable."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            times = [float(row["s"]) for row in csv.DictReader(lines, delimiter="\t")]
    except (OSError, KeyError, ValueError, TypeError):
        return None
    return fmean(times) if times else None
