"""Verdict rules of paper D's claims, where the general ones of :mod:`papers.common.verdicts` do not do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from papers.common.outcomes import FAILS, Case, Outcome, Ratio, Untested, estimate, estimate_ratio, judge
from papers.common.rows import cases_of, converged, pick
from papers.common.runs import Tables
from papers.common.verdicts import proportion, spearman, threshold

EIGEN = ("LA", "SA")
NO_GAIN = {
    "first diverged": "the second side gains nothing",
    "second diverged": "the first side gains nothing",
    "no ratio: on some seeds a side diverged": "no ratio: at some checkpoints a side gains nothing",
}


class Gains(Ratio):
    """A ratio of two gains: infinite where the second is nothing, 0 where the first is."""

    def __str__(self) -> str:
        return NO_GAIN.get(text := super().__str__(), text)


def settles(
    tables: Tables, *, spread_at_most: float, trends_differ: float, table: str | None = None, margin: float = 0.0
) -> Outcome:
    """D1: the top eigenvalues settle on each data set, and the most negative one goes its own way on each.

    Settled: over the later half of the checkpoints the largest value of λ_i is at most ``spread_at_most`` times the
    smallest (median over i; no multiple where that is not positive). The trend of |λ_d| is its mean over the later half
    over that of the earlier one; the trends of two data sets must differ by the factor ``trends_differ``.
    """
    rows = converged(pick(tables, table))
    if rows["dataset"].nunique() < 2:
        raise Untested("two data sets are needed")
    found: list[Case] = []
    trends: list[tuple[str, float]] = []
    for name, part in cases_of(rows):
        steps = np.sort(part["step"].unique())
        late = part["step"] >= steps[len(steps) // 2]
        top = part[late & (part["end"] == "LA")].groupby("index")["eigenvalue"]
        multiples = (top.max() / top.min()).where(top.min() > 0, np.inf)
        spread = estimate([float(multiples.median())], margin)
        case = Case(f"{name} top".strip(), spread, judge(spread, at_most=spread_at_most))
        if np.isinf(spread.value):
            case = replace(case, estimate=proportion(0, 0, 1), verdict=FAILS, note="not positive throughout")
        found.append(case)
        last = part[(part["end"] == "SA") & (part["index"] == 1)]
        size = last["eigenvalue"].abs()
        trends.append((str(part["dataset"].iloc[0]), float(size[late].mean() / size[~late].mean())))
    contrast = estimate([max(x / y for a, x in trends for b, y in trends if a != b)], margin)
    note = "trends " + ", ".join(f"{trend:.2g}" for _, trend in trends)
    found.append(Case("trends of |λ_d|", contrast, judge(contrast, at_least=trends_differ), note))
    return Outcome(tuple(found))


def directions_last(
    tables: Tables, *, directions: str, spectrum: str, top_at_least: float, positive_at_least: float
) -> Outcome:
    """D2: curvature along v_1(t0) stays near λ_1(t) (median ratio over t > 0), that along v_d(t0) is often positive."""
    rows, ends = pick(tables, directions), converged(pick(tables, spectrum, {"index": 1, "end": "LA"}))
    largest = ends.groupby(["dataset", "model", "step"])["eigenvalue"].mean().rename("largest")
    rows = rows[(rows["step"] > 0) & (rows["step"] != rows["origin_step"])].join(
        largest, on=["dataset", "model", "step"]
    )
    found = []
    for (end, origin), part in rows.groupby(["end", "origin_step"], sort=False):
        if end == "LA":
            ratio = estimate([float((part["curvature"] / part["largest"]).median())], margin=0.05)
            found.append(Case(f"v_1({origin}) / λ_1", ratio, judge(ratio, at_least=top_at_least)))
        else:
            share = proportion(int((part["curvature"] > 0).sum()), len(part), 1)
            found.append(Case(f"v_d({origin}) positive", share, judge(share, at_least=positive_at_least)))
    return Outcome(tuple(found))


def quadratic_breaks(
    tables: Tables, *, radius: float, beyond: float, good_below: float, broken_above: float, table: str | None = None
) -> Outcome:
    """D3: the quadratic model is good along v_1 up to ``radius`` and broken along v_d beyond |α| = ``beyond``.

    Misfit is the largest error over the largest change that the model predicts. The paper does not say for its
    figure whether α multiplies v or (gᵀv) v: the claim is read in the way that suits it better.
    """
    rows = pick(tables, table, {"radius": radius})
    readings = []
    for reading, part in rows.groupby("reading", sort=False):
        good = estimate([misfit(part[part["end"] == "LA"])], margin=0.05)
        broken = estimate([misfit(part[part["end"] == "SA"], beyond)], margin=0.05)
        cases = (
            Case(f"{reading}: misfit along v_1", good, judge(good, at_most=good_below)),
            Case(f"{reading}: along v_d", broken, judge(broken, at_least=broken_above)),
        )
        readings.append(Outcome(cases))
    order = ("holds", "inconclusive", "fails")
    return min(readings, key=lambda outcome: order.index(outcome.verdict))


def misfit(profile: pd.DataFrame, beyond: float = 0.0) -> float:
    """Largest |loss − quadratic model| where |α| > ``beyond``, over the largest change predicted there."""
    if profile.empty:
        raise Untested("no profile along this direction")
    change = profile["quadratic"] - np.polyfit(profile["alpha"], profile["quadratic"], 2)[-1]  # α = 0 may be no point
    error = profile["loss"] - profile["quadratic"]
    outer = profile["alpha"].abs() > beyond
    return float(error[outer].abs().max() / change[outer].abs().max())


def signs(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows along eigenvectors, by the sign of the eigenvalue. Raises ``Untested`` where one sign is missing."""
    eigen = rows[rows["kind"].isin(EIGEN)]
    parts = {"positive": eigen[eigen["curvature"] > 0], "negative": eigen[eigen["curvature"] < 0]}
    if empty := [sign for sign, part in parts.items() if part.empty]:
        raise Untested(f"no direction of {empty[0]} curvature")
    return parts


def large_scale(
    tables: Tables, *, column: str, above_at_least: float, margin: float = 0.0, table: str | None = None
) -> Outcome:
    """D4: a quadratic fit over a range curves more than the eigenvalue says, by more where that is negative.

    Measured: the share of fits above the eigenvalue, for each sign; and the median excess (fit − λ)/|λ| on the
    negative side less that on the positive one.
    """
    rows = pick(tables, table)
    if column not in rows:
        raise Untested(f"the table has no column {column}")
    found, excess = [], {}
    for sign, part in signs(rows[rows[column].notna()]).items():
        above = proportion(int((part[column] > part["curvature"]).sum()), len(part), 1)
        found.append(Case(f"above y = x, {sign} λ", above, judge(above, at_least=above_at_least), f"{len(part)} fits"))
        excess[sign] = float(((part[column] - part["curvature"]) / part["curvature"].abs()).median())
    more = estimate([excess["negative"] - excess["positive"]], margin)
    found.append(Case("excess, negative less positive", more, judge(more, at_least=0.0)))
    return Outcome(tuple(found))


def best_step(
    tables: Tables,
    *,
    positive_at_least: float,
    product: tuple[float, float],
    unrelated: float,
    margin: float = 0.0,
    table: str | None = None,
) -> Outcome:
    """D5: 1/α* follows λ where λ > 0, and neither λ nor |λ| where λ < 0.

    Positive: rank correlation of 1/α* with λ, and the median of α*λ within ``product``. Negative: the rank
    correlation with |λ| (with λ it is the same but for the sign) is at most ``unrelated`` in size.
    """
    parts = signs(pick(tables, table))
    positive = spearman(parts["positive"], "inverse_alpha", "curvature")
    products = (parts["positive"]["curvature"] / parts["positive"]["inverse_alpha"]).replace([np.inf, -np.inf], np.nan)
    median = estimate([float(products.median())], margin)
    negative = parts["negative"].assign(size=parts["negative"]["curvature"].abs())
    rank = spearman(negative, "inverse_alpha", "size")
    known = int(negative["inverse_alpha"].notna().sum())
    return Outcome(
        (
            Case("λ > 0: rank correlation", positive, judge(positive, at_least=positive_at_least)),
            Case("λ > 0: median of α*λ", median, judge(median, *product)),
            Case("λ < 0: rank correlation with |λ|", rank, judge(rank, -unrelated, unrelated), f"{known} rows"),
        )
    )


def improvement(tables: Tables, *, table: str | None = None, margin: float = 0.0) -> Outcome:
    """D6: a direction of negative curvature gains more than a positive one, all positive ones together gain more.

    Ratios of the mean gain of a direction (negative over positive) and of the totals (positive over negative), as
    geometric means over checkpoints with their spread.
    """
    parts = signs(pick(tables, table))
    gains = {sign: part.groupby("step")["improvement"].agg(["mean", "sum"]) for sign, part in parts.items()}
    floor = 1e-12
    each = (gains["negative"]["mean"] + floor) / (gains["positive"]["mean"] + floor)
    total = (gains["positive"]["sum"] + floor) / (gains["negative"]["sum"] + floor)
    found = []
    for name, ratios in (("negative / positive, one direction", each), ("positive / negative, totals", total)):
        ratio = estimate_ratio(ratios.dropna().tolist(), margin)
        measured = Gains(ratio.value, ratio.low, ratio.high, seeds=1)
        found.append(Case(name, measured, judge(measured, at_least=1.0), f"{ratios.notna().sum()} checkpoints"))
    return Outcome(tuple(found))


def cheaper(tables: Tables, *, largest: int, negative: int, table: str | None = None, margin: float = 0.0) -> Outcome:
    """D7: products for SA(``negative``) over those for LA(``largest``), with each solver."""
    rows = pick(tables, table)
    for end, k in (("LA", largest), ("SA", negative)):
        if set(rows.loc[rows["end"] == end, "k"]) != {k}:
            raise Untested(f"no {end}({k})")
    where = {"end": "SA"}
    return threshold({"": rows}, column="products_over_LA", where=where, by=["solver"], at_least=1.0, margin=margin)


def agreement(
    tables: Tables,
    *,
    share: float,
    pairs: int,
    difference_at_most: float,
    angle_at_most: float,
    table: str | None = None,
    margin: float = 0.0,
) -> Outcome:
    """D8: medians over eigenpairs of |λ_part − λ_all|/|λ_all| and of the principal angle in degrees, at each end.

    The part must be this ``share`` of the data, and at each end there must be so many ``pairs``. ``margin`` is that of
    the difference, and a share of a right angle.
    """
    rows = pick(tables, table)
    part, most = float((rows["part_examples"] / rows["all_examples"]).iloc[0]), int(rows["index"].max())
    if abs(part / share - 1) > 0.1 or most != pairs:
        raise Untested(f"{most} eigenpairs at each end of {part:.1%} of the data")
    found = []
    for end, part in rows.groupby("end", sort=False):
        relative = estimate([float(part["relative_difference"].abs().median())], margin)
        angle = estimate([float(part["principal_angle_deg"].median())], 90 * margin)
        found.append(Case(f"{end}: difference", relative, judge(relative, at_most=difference_at_most)))
        found.append(Case(f"{end}: angle in degrees", angle, judge(angle, at_most=angle_at_most)))
    return Outcome(tuple(found))
