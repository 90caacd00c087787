"""Verdict rules of paper A's claims, where the general ones of :mod:`papers.common.verdicts` do not do."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from papers.a.readings import STATEMENTS, score
from papers.a.tables import crossovers
from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, UNTESTED, Case, Outcome, Untested, exact, judge, number
from papers.common.rows import Where, cases_of, converged, pick
from papers.common.runs import Tables
from papers.common.verdicts import proportion

ORDER = (HOLDS, INCONCLUSIVE, UNTESTED, FAILS)


def crossover(
    tables: Tables,
    *,
    fast: str,
    slow: str,
    within_epochs: float | None = None,
    full_batch: bool = False,
    table: str | None = None,
    where: Where | None = None,
) -> Outcome:
    """A4, A5: ``fast`` leads early in training and ``slow`` leads from some step to the end, at each batch size.

    Measured is the share of seeds with such a crossover, of those that ran both, against nine in ten, as for paper C's
    small problems: what the paper shows of one run is to be seen in nearly all. With ``within_epochs``, with one no
    later. With ``full_batch`` the claim does not hold before the whole training set was a batch.
    """
    metrics = pick(tables, table, where)
    by_seed = pd.concat([crossovers(part, slow, fast).assign(seed=s) for s, part in metrics.groupby("seed")])
    by_seed = by_seed.dropna(subset="starts_faster")
    found = []
    for size, part in by_seed.groupby("batch_size"):
        limit = math.inf if within_epochs is None else within_epochs
        seen = part["starts_faster"].astype(bool) & (part["crossover_epoch"] <= limit)
        measured = proportion(int(seen.sum()), len(seen), len(seen))
        epochs = part["crossover_epoch"].dropna()
        note = f"at epoch {number(epochs.mean())}" if len(epochs) else "no crossover"
        verdict = judge(measured, at_least=0.9) if len(seen) > 1 else INCONCLUSIVE
        found.append(Case(f"batch {size}", measured, verdict, note))
    if found and full_batch and not (by_seed["steps_per_epoch"] == 1).any():
        found.append(Case("full batch", proportion(0, 0, metrics["seed"].nunique()), INCONCLUSIVE, "not run"))
    return Outcome(tuple(found))


def gap_elsewhere(
    tables: Tables,
    *,
    at: int,
    top: int,
    eigenvalue: str = "eigenvalue",
    table: str | None = None,
    where: Where | None = None,
) -> Outcome:
    """A6: neither the largest difference nor the largest ratio of neighbours among the ``top`` follows number ``at``.

    Only positive eigenvalues count. Measured is the number of the eigenvalue before the gap, for both readings.
    """
    rows = converged(pick(tables, table, where))
    found = []
    for name, part in cases_of(rows, ["seed"] if "seed" in rows and rows["seed"].nunique() > 1 else []):
        values = np.sort(part[eigenvalue].to_numpy(float))[::-1][:top]
        if len(values) < top:
            raise Untested(f"only {len(values)} eigenvalues")
        values = values[values > 0]
        if len(values) <= at + 1:
            raise Untested(f"only {len(values)} positive eigenvalues")
        for reading, gaps in (("difference", values[:-1] - values[1:]), ("ratio", values[:-1] / values[1:])):
            place = int(np.argmax(gaps)) + 1
            verdict = FAILS if place == at else HOLDS
            found.append(Case(f"{name} largest {reading} after".strip(), exact(place), verdict))
    return Outcome(tuple(found))


def rank_falls(
    tables: Tables, *, slack: int = 1, table: str | None = None, where: Where | None = None, final: float = 0.25
) -> Outcome:
    """A8: the rank of [v_1..v_C, e_0..e_C] is near 2C at the start and near C for the rest of training.

    "Near" is within ``slack``, on either side; the end is the last part ``final`` of the checkpoints (their median). A
    tolerance supports the claim if the fall shows at it while random vectors in the place of the v keep full rank
    (2C + 1 vectors). The claim holds if some tolerance of the sweep supports it; which ones is in the note.
    """
    rows = pick(tables, table, {**(where or {}), "quantity": "rank"})
    found = []
    for name, part in cases_of(rows):
        support, lines = [], []
        classes = int(part["classes"].iloc[0])
        ends = []
        for tolerance, at in part.groupby("tolerance"):
            at = at.sort_values("step")
            start, null = float(at["value"].iloc[0]), float(at["null"].min())
            end = float(at["value"].tail(max(1, round(final * len(at)))).median())
            ends.append(end)
            falls = start >= 2 * classes - slack and abs(end - classes) <= slack
            if falls and null >= 2 * classes + 1 - slack:
                support.append(tolerance)
            lines.append(f"{tolerance:g}: {start:.0f} to {end:.0f}, random {null:.0f}")
        verdict = HOLDS if support else FAILS
        note = f"C = {classes}; rank by tolerance {'; '.join(lines)}"
        found.append(Case(f"{name} lowest final rank".strip(), exact(min(ends)), verdict, note))
    return Outcome(tuple(found))


def best_reading(tables: Tables, *, table: str | None = None, where: Where | None = None) -> Outcome:
    """A12: the reading that meets most, and how many of the paper's statements hold for it; all must."""
    judged = pick(tables, table, where)
    best = score(judged).iloc[0]
    own = judged[judged["reading"] == best["reading"]].groupby("statement")["verdict"].agg(set)
    found = {key: min(own.get(key, {UNTESTED}), key=ORDER.index) for key in STATEMENTS}  # the best of several networks
    open_ = {key: verdict for key, verdict in found.items() if verdict != HOLDS}
    note = "; ".join(f"{STATEMENTS[key]}: {verdict}" for key, verdict in open_.items()) or "all hold"
    verdict = HOLDS if not open_ else FAILS if FAILS in open_.values() else INCONCLUSIVE
    return Outcome((Case(f"{best['reading']}", exact(best["hold"]), verdict, note),))
