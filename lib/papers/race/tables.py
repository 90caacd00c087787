r"""Tables of the race, from its runs. No torch here.

With :math:`\ell_o(h)` the mean final validation loss of optimiser o at horizon h, the speed-up of o over a rival r is
the ratio of the horizons at which both end at the same loss: at the rival's final loss,
:math:`1/h` with :math:`\ell_o(h)=\ell_r(1)`, or, where o does not get there, at o's, :math:`h` with
:math:`\ell_r(h)=\ell_o(1)`. Between horizons the loss is linear in :math:`\log h`. What lies beyond the shortest
horizon is bounded by it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from papers.common.intervals import half_width, interval
from papers.common.runs import NETWORK, Tables

DRAWS = 2000
"""Bootstrap samples over seeds."""

Losses = NDArray[np.float64]


def final_losses(races: pd.DataFrame, workload: Sequence[object], optimizer: str) -> pd.DataFrame:
    """Losses of an optimiser's final runs, one row a seed, one column a horizon; a diverged run has its first loss."""
    chosen = (races[NETWORK] == list(workload)).all(axis=1) & (races["optimizer"] == optimizer)
    final = races[chosen & (races["phase"] == "final")]
    ended = final["val_loss"].where((final["status"] == "finished") & np.isfinite(final["val_loss"]))
    wide = final.assign(loss=ended.fillna(final["start_loss"])).pivot(index="seed", columns="horizon", values="loss")
    return wide.dropna()


def speed_up(horizons: Losses, ours: Losses, theirs: Losses) -> tuple[float, bool]:
    """Ratio of horizons at the same loss for two mean curves (m,), and whether it is a bound only."""
    if ours[-1] <= theirs[-1]:
        h, bound = _reached(horizons, ours, theirs[-1])
        return 1 / h, bound
    return _reached(horizons, theirs, ours[-1])


def _reached(horizons: Losses, losses: Losses, target: float) -> tuple[float, bool]:
    """The first horizon, in units of the longest, at which a curve is down to a target that its end reaches."""
    x = np.log(horizons / horizons[-1])
    i = int(np.flatnonzero(losses <= target)[0])
    if i == 0:
        return float(np.exp(x[0])), losses[0] < target
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(np.exp(x[i - 1] + share * (x[i] - x[i - 1]))), False


def speed_ups(tables: Tables, against: Sequence[str]) -> pd.DataFrame:
    """One row per workload, optimiser and rival: the speed-up with its 95 % interval over seeds.

    Two are compared on the seeds that both have, ``seeds`` of them: a seed's start and order of examples are the same
    for all, and some are harder. So the interval is that of pairs (:func:`_interval`). ``beats``: the share of
    pairs of seeds in which the optimiser's final loss at the longest horizon is the lower. ``bound``: the speed-up
    lies beyond the shortest horizon.
    """
    races = tables["races"]
    rows = []
    for workload, part in races.groupby(NETWORK, sort=False):
        names = part["optimizer"].unique().tolist()
        for rival in [name for name in against if name in names]:
            rows += [_compared(races, workload, name, rival) for name in names if name != rival]
    columns = [*NETWORK, "optimizer", "against", "speed_up", "low", "high", "bound", "beats", "seeds"]
    return pd.DataFrame([row for row in rows if row], columns=columns)


def _compared(races: pd.DataFrame, workload: Sequence[object], name: str, rival: str) -> dict[str, object] | None:
    first, second = (final_losses(races, workload, optimizer) for optimizer in (name, rival))
    seeds = first.index.intersection(second.index)
    if seeds.empty or not first.columns.equals(second.columns):
        return None
    horizons = first.columns.to_numpy(float)
    ours, theirs = (losses.loc[seeds].to_numpy(float) for losses in (first, second))
    value, bound = speed_up(horizons, ours.mean(0), theirs.mean(0))
    low, high = _interval(horizons, ours, theirs, value)
    beats = (ours[:, -1][:, None] < theirs[:, -1]).mean()
    keys = dict(zip(NETWORK, workload, strict=True))
    measured = {"speed_up": value, "low": low, "high": high, "bound": bound, "beats": float(beats)}
    return {**keys, "optimizer": name, "against": rival, **measured, "seeds": len(seeds)}


def _interval(horizons: Losses, ours: Losses, theirs: Losses, value: float) -> tuple[float, float]:
    r"""95 % interval of a speed-up: Student's t of its logarithm, with the standard error of a bootstrap over seeds.

    A sample is seeds, each with its runs of both; its variance is :math:`(n-1)/n` of that of fresh seeds. The sample's
    own quantiles would cover the truth in 0.82 of all cases with five seeds, and in 0.54 with two. Of what lies
    beyond the shortest horizon nothing is known: the interval ends there.
    """
    n = len(ours)
    if n < 2:
        return np.nan, np.nan
    draw = np.random.default_rng(0)
    samples = (draw.integers(n, size=n) for _ in range(DRAWS))
    sampled = [speed_up(horizons, ours[sample].mean(0), theirs[sample].mean(0))[0] for sample in samples]
    half = half_width(float(np.std(np.log(sampled))) * n / np.sqrt(n - 1), n)
    most = horizons[-1] / horizons[0]
    return max(value * np.exp(-half), 1 / most), min(value * np.exp(half), most)


def results(tables: Tables) -> pd.DataFrame:
    """X-R4: one row per workload and optimiser at each horizon: what the tuned setting ends at, and what it costs.

    ``*_low``, ``*_high``: 95 % t-interval over seeds. Means are over the runs that finished; ``diverged`` did not.
    ``mean_weights_val_loss``: with the running mean of the weights.
    ``edge``: hyper-parameters whose best value lies within a tenth of the (logarithmic) range from its end.
    """
    races = tables["races"]
    searched = [name for name in races if _is_searched(races, name)]
    rows = []
    for key, part in races[races["phase"] == "final"].groupby([*NETWORK, "optimizer", "horizon"], sort=False):
        whole = part["status"] == "finished"
        loss = interval(part["val_loss"].where(whole).dropna())
        accuracy = interval(part["val_accuracy"].where(whole).dropna())
        best = {name: part[name].iloc[0] for name in searched}
        bounds = dict(_bounds(part["bounds"].iloc[0]))
        rows.append(
            {
                **dict(zip([*NETWORK, "optimizer", "horizon"], key, strict=True)),
                "seeds": len(part),
                "diverged": int((~whole).sum()),
                **dict(zip(("val_loss", "val_loss_low", "val_loss_high"), loss, strict=True)),
                **dict(zip(("val_accuracy", "val_accuracy_low", "val_accuracy_high"), accuracy, strict=True)),
                "train_loss": part["train_loss"].where(whole).mean(),
                "worst_class_accuracy": part["worst_class_accuracy"].mean(),
                "mean_weights_val_loss": part["average_val_loss"].where(whole).mean(),
                "ms_per_step": 1000 * float((part["wall_s"] / part["steps"]).median()),
                "gradients_per_step": float((part["gradient_evaluations"] / part["steps"]).median()),
                **best,
                "edge": " ".join(name for name, limits in bounds.items() if at_edge(best[name], *limits)),
            }
        )
    return pd.DataFrame(rows)


def _is_searched(races: pd.DataFrame, name: str) -> bool:
    return any(f"'{name}'" in text for text in races["bounds"].unique())


def _bounds(text: str) -> Mapping[str, tuple[float, float]]:
    return {name: (float(low), float(high)) for name, (low, high) in ast.literal_eval(text).items()}


def at_edge(value: float, low: float, high: float) -> bool:
    """Within a tenth of the logarithmic range from one of its ends."""
    place = np.log(value / low) / np.log(high / low)
    return bool(place < 0.1 or place > 0.9)
