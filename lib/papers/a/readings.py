"""A-R: each reading of paper A's method, judged by what the paper says of the method. No torch here.

A reading is compared with SGD under the same form of momentum, run by run at equal learning rate and seed. "Closing"
is the mean over the last quarter of a run's evaluations on the validation set; a run *learns* if its closing loss is
below the untrained network's by :data:`LEARNS` of it, and else counts as diverged. A reading that fails at one rate
need not be run at the others; what then is not decided stays open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from papers.a.tables import crossovers
from papers.common.outcomes import FAILS, HOLDS, UNTESTED, Estimate, estimate, estimate_ratio, judge
from papers.common.runs import Tables

Pairs = Mapping[str, Sequence[str]]
"""The first-order optimiser of each form of momentum -> the readings that go with it."""
LEARNS = 0.01
MARGINS = {"accuracy": 2.0, "ratio": 0.2}
"""Points, and part of a ratio, that a single pair of runs is not trusted to show."""
FEW = 3
"""With fewer pairs there is no interval over them: their range stands for it, wider by the margin at both ends."""
STATEMENTS = {
    "trains": "trains at each rate",
    "near": "final accuracy within 3 points of SGD's",
    "below": "final accuracy below SGD's",
    "volatile": "more volatile than SGD",
    "slower": "slower than SGD",
    "diverges": "diverges above, as SGD does",
    "overtaken": "MNIST: ahead of SGD, then overtaken, at each batch size",
}
"""What the paper's text says, in its order."""
TABLES = "tables as labelled: SGD falls more with η"
"""What its two tables say, which the text contradicts unless their columns are swapped: judged, not scored."""


@dataclass(frozen=True)
class Judgement:
    """One statement about one reading: the number, of how many cases how many are as the paper says, the verdict."""

    statement: str
    measured: Estimate
    met: int
    cases: int
    verdict: str
    network: str = ""


def judgements(tables: Tables, pairs: Pairs, above: float) -> pd.DataFrame:
    """A-R2: one row a reading and statement; ``above`` is the highest rate at which the paper's runs train.

    Columns: momentum (its SGD), reading, statement, network (of the MNIST statement, which is judged for each), value,
    low, high (a 95 % interval over rates and seeds; of fewer than three pairs their range, with a margin), met, cases,
    verdict.

    Units of value: shares of runs; accuracies in points, reading minus SGD; ratios reading / SGD of the standard
    deviation of the loss's change between evaluations, and of the steps to the loss that SGD has half way.
    """
    rates, batches = summary(tables["rates"]), tables.get("batches")
    rows = []
    for sgd, readings in pairs.items():
        for reading in readings:
            for found in _all(rates, batches, sgd, reading, above):
                numbers = {"value": found.measured.value, "low": found.measured.low, "high": found.measured.high}
                counts = {"met": found.met, "cases": found.cases, "verdict": found.verdict}
                names = {"statement": found.statement, "network": found.network}
                rows.append({"momentum": sgd, "reading": reading, **names, **numbers, **counts})
    return pd.DataFrame(rows)


def score(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a reading, the best first: ``hold``, how many of the paper's statements hold; ``met``, in how many cases.

    The paper's network for MNIST is not known: the statement about it holds if it does for one of the networks.
    """
    scored = judged[judged["statement"].isin(STATEMENTS)]
    scored = scored.assign(holds=scored["verdict"] == HOLDS, share=scored["met"] / scored["cases"].clip(lower=1))
    holds = scored.groupby(["momentum", "reading", "statement"], sort=False)
    by_reading = holds["holds"].any().groupby(["momentum", "reading"], sort=False).sum()
    met = holds["share"].max().groupby(["momentum", "reading"], sort=False).sum()
    table = pd.DataFrame({"hold": by_reading, "met": met}).reset_index()
    return table.sort_values(["hold", "met"], ascending=False, kind="stable").reset_index(drop=True)


def readings_by_statement(tables: Tables, pairs: Pairs, above: float) -> pd.DataFrame:
    """A-R1: one row a reading, the one that meets most first; a cell is the verdict, the cases met, the number."""
    judged = judgements(tables, pairs, above)
    rows = []
    for _, place in score(judged).iterrows():
        own = judged[judged["reading"] == place["reading"]]
        row = {"momentum": place["momentum"], "reading": place["reading"], "statements that hold": int(place["hold"])}
        for key, words in (*STATEMENTS.items(), ("tables", TABLES)):
            for _, one in own[own["statement"] == key].iterrows():
                row[f"{words}, {one['network']}" if one["network"] else words] = _cell(one)
        rows.append(row)
    return pd.DataFrame(rows)


def _cell(row: pd.Series) -> str:
    if row["cases"] == 0:
        return "no runs to judge"
    if not math.isfinite(row["value"]):
        number = "never reached"
    elif row["low"] == row["high"] or not math.isfinite(row["high"]):
        number = f"{row['value']:.3g}"
    else:
        number = f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['verdict']}: {number} ({row['met']} of {row['cases']})"


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row a run, by (optimizer, lr, seed): learns, closing loss and accuracy (%), volatility, and its curve.

    ``curve`` is the validation loss by step, smoothed by a running median of three evaluations; infinite from where a
    run diverged, which is where its loss is no number or, since all runs are equally long, where it ends before others.
    """
    rows, end = [], metrics["step"].max()
    for key, part in metrics.sort_values("step").groupby(["optimizer", "lr", "seed"], sort=False):
        last = part["step"] == part["step"].max()
        seen = part[part["val_loss"].notna() | last].set_index("step")
        loss = seen["val_loss"].fillna(math.inf)
        if loss.index[-1] < end:
            loss.iloc[-1] = math.inf
        late = loss.iloc[-max(1, (len(loss) - 1) // 4) :]
        rows.append(
            {
                **dict(zip(("optimizer", "lr", "seed"), key, strict=True)),
                "learns": bool(late.mean() < (1 - LEARNS) * loss.iloc[0]),
                "loss": late.mean(),
                "accuracy": 100 * seen["val_accuracy"].reindex(late.index).mean(),
                "volatility": loss[np.isfinite(loss)].diff().std(),
                "curve": loss.rolling(3, min_periods=1, center=True).median(),
            }
        )
    return pd.DataFrame(rows).set_index(["optimizer", "lr", "seed"]).sort_index()


def _all(
    rates: pd.DataFrame, batches: pd.DataFrame | None, sgd: str, reading: str, above: float
) -> Iterator[Judgement]:
    ours, theirs = rates.loc[reading], rates.loc[sgd].reindex(rates.loc[reading].index)
    low = ours.index.get_level_values("lr") <= above
    trained = {lr for lr in rates.loc[sgd].index.get_level_values("lr") if lr <= above}
    missing = trained - set(ours[low].index.unique("lr"))
    trains = _every("trains", ours["learns"][low])
    yield replace(trains, verdict=UNTESTED) if trains.verdict == HOLDS and missing else trains
    both = low & ours["learns"] & theirs["learns"].eq(True)
    a, b = ours[both], theirs[both]
    difference = a["accuracy"] - b["accuracy"]
    ratio = (a["volatility"] / b["volatility"]).astype(float)
    delays = _delays(a["curve"], b["curve"])
    known = theirs["learns"].notna()
    compared = bool((low & known).any())
    for found, open_ in (
        (_mean("near", difference, difference.abs() <= 3, at_least=-3.0, at_most=3.0), not compared),
        (_mean("below", difference, difference < 0, at_most=0.0), not compared),
        (_ratio("volatile", ratio), not compared),
        (_ratio("slower", delays), not compared or (len(a) > 0 and delays.empty)),  # SGD had not moved half way
    ):
        yield replace(found, verdict=UNTESTED) if open_ else found
    high = known & ~low
    yield _every("diverges", ~(ours["learns"][high] | theirs["learns"][high].eq(True)))
    for network, part in batches.groupby("model", sort=False) if batches is not None else ():
        yield _overtaken(str(network), part, sgd, reading)
    yield _falls(a["accuracy"], b["accuracy"], max(trained), min(trained))


def _every(statement: str, cases: pd.Series) -> Judgement:
    """A statement about each run: the share for which it is true, and it holds if that is all."""
    met, total = int(cases.sum()), len(cases)
    verdict = UNTESTED if total == 0 else HOLDS if met == total else FAILS
    share = met / total if total else math.nan
    return Judgement(statement, Estimate(share, share, share, total), met, total, verdict)


def _mean(
    statement: str, values: pd.Series, met: pd.Series, at_least: float | None = None, at_most: float | None = None
) -> Judgement:
    """A statement about the mean over pairs of runs that both learn; with no such pair it fails."""
    measured = _estimate(values.to_numpy(float))
    verdict = judge(measured, at_least, at_most) if len(values) else FAILS
    return Judgement(statement, measured, int(met.sum()), len(values), verdict)


def _estimate(values: np.ndarray, margin: float = MARGINS["accuracy"]) -> Estimate:
    """Mean and interval; of few values mean and range, with the margin."""
    if 0 < len(values) < FEW:
        return Estimate(float(values.mean()), float(values.min()) - margin, float(values.max()) + margin, len(values))
    return estimate(values.tolist())


def _ratio(statement: str, ratios: pd.Series) -> Judgement:
    """A ratio to SGD that the paper says is above 1."""
    found = ratios.to_numpy(float)
    if 0 < len(found) < FEW and np.isfinite(found).all():
        logs = _estimate(np.log(found), math.log1p(MARGINS["ratio"]))
        value, low, high = np.exp([logs.value, logs.low, logs.high]).tolist()
        measured = Estimate(value, low, high, logs.seeds)
    else:
        measured = estimate_ratio(found, MARGINS["ratio"])
    verdict = judge(measured, at_least=1.0) if len(ratios) else FAILS
    return Judgement(statement, measured, int((ratios > 1).sum()), len(ratios), verdict)


def _delays(ours: pd.Series, theirs: pd.Series) -> pd.Series:
    """Steps to the loss that SGD has half way, over SGD's own; infinite where it is never reached."""
    found = {}
    for key in ours.index:
        target = float(np.interp(theirs[key].index[-1] / 2, theirs[key].index, theirs[key]))
        if target < (1 - LEARNS) * theirs[key].iloc[0]:
            found[key] = _first_below(ours[key], target) / _first_below(theirs[key], target)
    return pd.Series(found, dtype=float)


def _first_below(curve: pd.Series, target: float) -> float:
    reached = curve.index[curve <= target]
    return float(reached[0]) if len(reached) else math.inf


def _overtaken(network: str, runs: pd.DataFrame, sgd: str, reading: str) -> Judgement:
    """Ahead in the first tenth of the run and behind from some step to the end, by batch size and seed."""
    cases = []
    for _, part in runs[runs["optimizer"].isin([sgd, reading])].groupby("seed"):
        if part["optimizer"].nunique() < 2:
            continue
        found = crossovers(part, sgd, reading).dropna(subset="starts_faster")
        cases += (found["starts_faster"].eq(True) & found["crossover_step"].notna()).tolist()
    judged = _every("overtaken", pd.Series(cases, dtype=bool))
    return Judgement(judged.statement, judged.measured, judged.met, judged.cases, judged.verdict, network)


def _falls(ours: pd.Series, theirs: pd.Series, top: float, bottom: float) -> Judgement:
    """By how many points more SGD's accuracy falls from the highest rate to the lowest, for each seed (paper: 4)."""
    a, b = (x.unstack("lr") if len(x) else pd.DataFrame() for x in (ours, theirs))
    if top == bottom or not {top, bottom} <= set(a):
        return Judgement("tables", estimate([]), 0, 0, UNTESTED)
    more = ((b[top] - b[bottom]) - (a[top] - a[bottom])).dropna()
    measured = _estimate(more.to_numpy(float))
    return Judgement("tables", measured, int((more > 0).sum()), len(more), judge(measured, at_least=0.0))
