"""Paper D's verdict rules on made-up tables that must give each verdict."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, Untested
from papers.d import verdicts as claims_d


def spectra(late_top: float, late_bottom: dict[str, float]) -> pd.DataFrame:
    """Two data sets; λ_1 goes from 10 to ``late_top`` within the later half, λ_d from −1 to its late value."""
    rows = []
    for dataset, bottom in late_bottom.items():
        for step in range(10):
            late = step >= 5
            top = 10.0 if step < 7 else late_top
            rows.append({"dataset": dataset, "step": step, "end": "LA", "index": 1, "eigenvalue": top})
            rows.append(
                {"dataset": dataset, "step": step, "end": "SA", "index": 1, "eigenvalue": -bottom if late else -1.0}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("late_top", "late_bottom", "verdict"),
    [
        (12.0, {"mnist": 0.1, "cifar10": 2.0}, HOLDS),
        (90.0, {"mnist": 0.1, "cifar10": 2.0}, FAILS),
        (12.0, {"mnist": 1.0, "cifar10": 1.0}, FAILS),
        (29.5, {"mnist": 0.1, "cifar10": 2.0}, INCONCLUSIVE),
    ],
)
def test_settles(late_top: float, late_bottom: dict[str, float], verdict: str) -> None:
    table = {"t": spectra(late_top, late_bottom)}
    assert claims_d.settles(table, spread_at_most=3.0, trends_differ=2.0, margin=0.1).verdict == verdict


def test_settles_needs_two_data_sets() -> None:
    with pytest.raises(Untested, match="two data sets"):
        claims_d.settles({"t": spectra(12, {"mnist": 1.0})}, spread_at_most=3, trends_differ=2)


def test_settles_compares_data_sets_and_no_two_networks_on_one() -> None:
    parts = [spectra(12, {"mnist": late}).assign(model=f"m{late:g}") for late in (0.1, 2.0)]
    options = {"spread_at_most": 3.0, "trends_differ": 2.0, "margin": 0.1}
    with pytest.raises(Untested, match="two data sets"):
        claims_d.settles({"t": pd.concat(parts)}, **options)
    other = spectra(12, {"cifar10": 2.0}).assign(model="m")
    near = [parts[1], spectra(12, {"mnist": 2.1}).assign(model="m2.1"), other]
    outcome = claims_d.settles({"t": pd.concat(near)}, **options)
    assert outcome.verdict == FAILS
    assert outcome.cases[-1].estimate.value == pytest.approx(1.05)


def test_eigenvalues_that_have_not_converged_decide_nothing() -> None:
    table = spectra(12, {"mnist": 0.1, "cifar10": 2.0}).assign(converged=True)
    options = {"spread_at_most": 3.0, "trends_differ": 2.0, "margin": 0.1}
    assert claims_d.settles({"t": table}, **options).verdict == HOLDS
    table.loc[3, "converged"] = False
    with pytest.raises(Untested, match="not all eigenvalues have converged"):
        claims_d.settles({"t": table}, **options)


def test_a_top_eigenvalue_that_changes_its_sign_has_not_settled() -> None:
    table = spectra(-0.5, {"mnist": 0.1, "cifar10": 2.0})
    outcome = claims_d.settles({"t": table}, spread_at_most=3.0, trends_differ=2.0, margin=0.1)
    assert outcome.verdict == FAILS
    assert "top: no number (not positive throughout)" in outcome.measured


def directions(top: float, bottom_positive: int) -> dict[str, pd.DataFrame]:
    """v_1(5) keeps the share ``top`` of λ_1; v_d(5) is positive at so many of 40 other checkpoints."""
    steps = range(1, 42)
    others = [s for s in steps if s != 5]
    rows = [{"model": "m", "step": s, "end": "LA", "origin_step": 5, "curvature": 10 * top} for s in steps]
    rows += [
        {"model": "m", "step": s, "end": "SA", "origin_step": 5, "curvature": 1.0 if i < bottom_positive else -1.0}
        for i, s in enumerate(others)
    ]
    spectrum = pd.DataFrame([{"model": "m", "step": s, "end": "LA", "index": 1, "eigenvalue": 10.0} for s in steps])
    return {"directions": pd.DataFrame(rows), "spectrum": spectrum}


@pytest.mark.parametrize(
    ("top", "positive", "verdict"), [(0.9, 38, HOLDS), (0.2, 38, FAILS), (0.9, 2, FAILS), (0.9, 20, INCONCLUSIVE)]
)
def test_directions_last(top: float, positive: int, verdict: str) -> None:
    options = {"directions": "directions", "spectrum": "spectrum", "top_at_least": 0.5, "positive_at_least": 0.5}
    tables = {name: table.assign(dataset="mnist") for name, table in directions(top, positive).items()}
    assert claims_d.directions_last(tables, **options).verdict == verdict
    other = tables["spectrum"].assign(dataset="cifar10", eigenvalue=1e3)  # the same network on other data
    tables["spectrum"] = pd.concat([tables["spectrum"], other])
    assert claims_d.directions_last(tables, **options).verdict == verdict


def profile(reading: str, top_error: float, bottom_error: float) -> pd.DataFrame:
    alpha = np.linspace(-1, 1, 21)
    parts = []
    for end, curvature, error in (("LA", 10.0, top_error), ("SA", -1.0, bottom_error)):
        quadratic = 1 + 0.5 * curvature * alpha**2
        loss = quadratic + error * abs(curvature) / 2 * alpha**2
        parts.append(pd.DataFrame({"end": end, "alpha": alpha, "quadratic": quadratic, "loss": loss}))
    return pd.concat(parts).assign(reading=reading, radius=1.0)


@pytest.mark.parametrize(
    ("top", "bottom", "verdict"), [(0.1, 5.0, HOLDS), (0.9, 5.0, FAILS), (0.1, 0.2, FAILS), (0.48, 5.0, INCONCLUSIVE)]
)
def test_quadratic_breaks(top: float, bottom: float, verdict: str) -> None:
    options = {"radius": 1.0, "beyond": 0.05, "good_below": 0.5, "broken_above": 1.0}
    one = profile("unit", top, bottom)
    assert claims_d.quadratic_breaks({"t": one}, **options).verdict == verdict
    # a second reading in which nothing breaks does not take the first one's verdict away
    both = pd.concat([profile("eq. 1", 0.0, 0.0), one])
    assert claims_d.quadratic_breaks({"t": both}, **options).verdict == verdict


@pytest.mark.parametrize("points", [3, 4, 21, 24])
def test_the_misfit_is_over_the_change_from_the_origin_whatever_the_points(points: int) -> None:
    alpha = np.linspace(-1, 1, points)
    change = 0.3 * alpha - 2 * alpha**2
    table = pd.DataFrame({"alpha": alpha, "quadratic": 5 + change, "loss": 5 + change + 0.46 * alpha**2})
    assert claims_d.misfit(table) == pytest.approx(0.2)  # 0.46 over 2.3


def fits(positive: float, negative: float) -> pd.DataFrame:
    """Forty fits a sign; each is its eigenvalue plus that multiple of its size."""
    size = np.linspace(1, 2, 40)
    parts = [
        pd.DataFrame({"kind": kind, "curvature": sign * size, "fit": sign * size + excess * size})
        for kind, sign, excess in (("LA", 1, positive), ("SA", -1, negative))
    ]
    return pd.concat(parts)


def test_large_scale() -> None:
    options = {"column": "fit", "above_at_least": 0.5, "margin": 0.1}
    assert claims_d.large_scale({"t": fits(0.1, 3.0)}, **options).verdict == HOLDS
    assert claims_d.large_scale({"t": fits(-0.1, 3.0)}, **options).verdict == FAILS
    assert claims_d.large_scale({"t": fits(3.0, 0.1)}, **options).verdict == FAILS
    half = fits(0.1, 3.0)
    half.loc[(half["kind"] == "LA") & (half["curvature"] > 1.5), "fit"] = 0.0
    assert claims_d.large_scale({"t": half}, **options).verdict == INCONCLUSIVE
    with pytest.raises(Untested, match="negative"):
        claims_d.large_scale({"t": fits(0.1, 3.0).query("curvature > 0")}, **options)


def searches(noise: float, follows: bool, factor: float = 1.0) -> pd.DataFrame:
    generator = np.random.default_rng(3)
    size = np.linspace(0.5, 5, 60)
    positive = size * factor * np.exp(noise * generator.standard_normal(60))
    negative = size if follows else generator.permutation(size)
    return pd.concat(
        [
            pd.DataFrame({"kind": "LA", "curvature": size, "inverse_alpha": positive}),
            pd.DataFrame({"kind": "SA", "curvature": -size, "inverse_alpha": negative}),
        ]
    )


@pytest.mark.parametrize(
    ("table", "verdict"),
    [
        (searches(0.05, follows=False), HOLDS),
        (searches(0.05, follows=True), FAILS),
        (searches(0.05, follows=False, factor=5.0), FAILS),
        (searches(0.6, follows=False), INCONCLUSIVE),
    ],
)
def test_best_step(table: pd.DataFrame, verdict: str) -> None:
    outcome = claims_d.best_step({"t": table}, positive_at_least=0.7, product=(0.5, 2.0), unrelated=0.4, margin=0.05)
    assert outcome.verdict == verdict


def test_directions_without_a_best_step_are_not_counted() -> None:
    table = searches(0.05, follows=False)
    table.loc[(table["kind"] == "SA") & (table["curvature"] < -4), "inverse_alpha"] = np.nan
    outcome = claims_d.best_step({"t": table}, positive_at_least=0.7, product=(0.5, 2.0), unrelated=0.4, margin=0.05)
    assert outcome.cases[-1].note == f"{(np.linspace(0.5, 5, 60) <= 4).sum()} rows"


def gains(negative: float, spread: float = 0.0) -> pd.DataFrame:
    """Per checkpoint ten positive directions that gain 1 each and two negative ones."""
    rows = []
    for step in range(4):
        rows += [{"kind": "LA", "step": step, "curvature": 1.0, "improvement": 1.0}] * 10
        value = negative * np.exp(spread * (step - 1.5))
        rows += [{"kind": "SA", "step": step, "curvature": -1.0, "improvement": value}] * 2
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("table", "verdict"),
    [(gains(2.0), HOLDS), (gains(0.5), FAILS), (gains(20.0), FAILS), (gains(2.0, spread=2.0), INCONCLUSIVE)],
)
def test_improvement(table: pd.DataFrame, verdict: str) -> None:
    assert claims_d.improvement({"t": table}).verdict == verdict


@pytest.mark.parametrize(
    ("first", "rest", "text"),
    [(0.0, 0.0, "the first side gains nothing"), (0.0, 1.0, "no ratio: at some checkpoints a side gains nothing")],
)
def test_a_side_without_a_gain_has_not_diverged(first: float, rest: float, text: str) -> None:
    table = gains(1.0)
    negative = table["kind"] == "SA"
    table.loc[negative, "improvement"] = np.where(table.loc[negative, "step"] == 0, first, rest)
    outcome = claims_d.improvement({"t": table})
    assert text in outcome.measured
    assert "diverged" not in outcome.measured


def costs(largest: int, negative: int, ratios: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {"solver": solver, "end": end, "k": k, "products_over_LA": ratio if end == "SA" else 1.0}
        for solver, ratio in zip(("ARPACK", "curvspace"), ratios, strict=True)
        for end, k in (("LA", largest), ("SA", negative))
    ]
    return pd.DataFrame(rows)


def test_cheaper_is_about_twenty_and_three() -> None:
    options = {"largest": 20, "negative": 3, "margin": 0.1}
    assert claims_d.cheaper({"t": costs(20, 3, (1.5, 1.2))}, **options).verdict == HOLDS
    assert claims_d.cheaper({"t": costs(20, 3, (1.5, 0.8))}, **options).verdict == FAILS
    assert claims_d.cheaper({"t": costs(20, 3, (1.5, 1.05))}, **options).verdict == INCONCLUSIVE
    for largest, negative, name in ((5, 3, r"LA\(20\)"), (20, 8, r"SA\(3\)")):
        with pytest.raises(Untested, match=name):
            claims_d.cheaper({"t": costs(largest, negative, (1.5, 1.2))}, **options)


def test_agreement() -> None:
    table = pd.DataFrame(
        {
            "end": ["LA"] * 3 + ["SA"] * 3,
            "index": [1, 2, 3] * 2,
            "part_examples": 2500,
            "all_examples": 50000,
            "relative_difference": [0.1, -0.1, 0.2] * 2,
            "principal_angle_deg": [5, 10, 20] * 2,
        }
    )
    options = {"share": 0.05, "pairs": 3, "difference_at_most": 0.25, "angle_at_most": 30.0, "margin": 0.05}
    assert claims_d.agreement({"t": table}, **options).verdict == HOLDS
    assert claims_d.agreement({"t": table.assign(principal_angle_deg=80)}, **options).verdict == FAILS
    assert claims_d.agreement({"t": table.assign(relative_difference=0.24)}, **options).verdict == INCONCLUSIVE
    with pytest.raises(Untested, match=r"3 eigenpairs at each end of 2.0% of the data"):
        claims_d.agreement({"t": table.assign(part_examples=1000)}, **options)
    with pytest.raises(Untested, match=r"3 eigenpairs"):
        claims_d.agreement({"t": table}, **{**options, "pairs": 10})
