r"""Tables of the tournament, from its races. No torch here: table jobs start fast.

The target of a network is the loss that the best-tuned reference optimiser reaches on *every* seed within the budget
(of those on which it did not diverge: a run cut short has reached next to nothing).
Every optimiser is asked when it first reaches it: after how many steps, gradient-equivalents and seconds. A run that
never does counts with its whole budget, which bounds its speed-up from above and that of others over it from below; the
table says how many did. The budget is the network's number of steps: a run that diverged counts with all of them, at
its own cost a step.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from papers.common.intervals import interval
from papers.common.runs import NETWORK, Tables, last_rows

UNITS = {"steps": "step", "gradient_evaluations": "gradient_evaluations", "seconds": "wall_s"}
"""What a speed-up counts -> the column of the race which counts it."""


def targets(races: pd.DataFrame, reference: str, column: str = "val_loss") -> pd.Series:
    """Target loss by network: the highest, over the reference's final runs that finished, of their lowest losses."""
    final = races[(races["phase"] == "final") & (races["optimizer"] == reference) & (races["status"] == "finished")]
    lowest = final.groupby([*NETWORK, "seed"])[column].min()
    return lowest.groupby(NETWORK).max().rename("target")


def arrivals(races: pd.DataFrame, reference: str, column: str = "val_loss") -> pd.DataFrame:
    """One row per final run: what it had spent when its loss first reached the target, linear between evaluations.

    Columns: network, optimizer, lr, seed, target, reached, steps, gradient_evaluations, seconds.
    """
    goal = targets(races, reference, column)
    rows = []
    final = races[races["phase"] == "final"]
    budget = final.groupby(NETWORK)["step"].max()
    for key, run in final.groupby([*NETWORK, "optimizer", "lr", "seed"], sort=False):
        target = goal.get(key[: len(NETWORK)], np.nan)
        run = run.sort_values("step")
        losses = run[column].to_numpy(float)
        below = np.flatnonzero(losses <= target)
        row = dict(zip([*NETWORK, "optimizer", "lr", "seed"], key, strict=True)) | {"target": target}
        row["reached"] = len(below) > 0
        for unit, spent in UNITS.items():
            row[unit] = _spent(run[spent].to_numpy(float), losses, target, below)
            if not row["reached"]:
                row[unit] *= budget[key[: len(NETWORK)]] / run["step"].iloc[-1]
        rows.append(row)
    return pd.DataFrame(rows, columns=[*NETWORK, "optimizer", "lr", "seed", "target", "reached", *UNITS])


def _spent(spent: np.ndarray, losses: np.ndarray, target: float, below: np.ndarray) -> float:
    """What was spent at the crossing; all that was, where there is none."""
    if len(below) == 0:
        return float(spent[-1])
    i = int(below[0])
    if i == 0 or not np.isfinite(losses[i - 1]):
        return float(spent[i])
    return float(np.interp(-target, -losses[i - 1 : i + 1], spent[i - 1 : i + 1]))


def ranking(tables: Tables, reference: str, column: str = "val_loss") -> pd.DataFrame:
    """A-X2: one row per network and optimiser at its own best learning rate.

    ``edge``: the best rate is an end of the grid. ``tuning_diverged``: share of the tuning runs which diverged.
    ``*_low``, ``*_high``: 95 % t-interval over seeds. ``cost_per_step``: gradient-equivalents; ``seconds_per_step``.
    """
    races = tables["races"]
    spent = arrivals(races, reference, column)
    rows = []
    for key, race in races.groupby([*NETWORK, "optimizer"], sort=False):
        row = dict(zip([*NETWORK, "optimizer"], key, strict=True)) | _rate(race)
        final = race[race["phase"] == "final"]
        last = last_rows(final, ["seed"])
        row |= {"seeds": final["seed"].nunique(), "diverged": int((last["status"] == "diverged").sum())}
        for name in ("val_loss", "val_accuracy", "eval_train_loss"):
            found = last[name].fillna(np.inf) if name.endswith("loss") else last[name]  # NaN: diverged
            row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(found)
        mine = spent[(spent[[*NETWORK, "optimizer"]] == list(key)).all(axis=1)]
        row |= {"target": mine["target"].iloc[0] if len(mine) else np.nan, "reached": int(mine["reached"].sum())}
        row |= {f"{unit}_to_target": mine[unit].mean() for unit in UNITS}
        row["cost_per_step"] = (last["gradient_evaluations"] / last["step"]).mean()
        row["seconds_per_step"] = (last["wall_s"] / last["step"]).mean()
        rows.append(row)
    return pd.DataFrame(rows).sort_values([*NETWORK, "val_loss"], na_position="last").reset_index(drop=True)


def _rate(race: pd.DataFrame) -> dict[str, object]:
    """The learning rate of the final runs (NaN where there are none), and how the grid fared."""
    tuning, final = race[race["phase"] == "tuning"], race[race["phase"] == "final"]
    last = last_rows(tuning, ["lr", "seed"])
    best = float(final["lr"].iloc[0]) if len(final) else np.nan
    return {
        "best_lr": best,
        "edge": best in (tuning["lr"].min(), tuning["lr"].max()),
        "tuning_diverged": float((last["status"] == "diverged").mean()),
    }


def speed_ups(tables: Tables, reference: str, against: list[str], column: str = "val_loss") -> pd.DataFrame:
    """A-X2-speedup: how many times fewer steps, gradient-equivalents and seconds to the target, per network.

    The ratio (other / own) is paired by seed; its geometric mean has a 95 % t-interval of the logarithm. ``reached``
    of ``seeds`` own runs reached the target; where not all did, the ratio is an upper bound (``bound``), and where not
    all of the other's did, a lower one (``bound_below``).
    """
    spent = arrivals(tables["races"], reference, column)
    rows = []
    for network, group in spent.groupby(NETWORK, sort=False):
        for other in against:
            base = group[group["optimizer"] == other].set_index("seed")
            for optimizer, own in group.groupby("optimizer", sort=False):
                own = own.set_index("seed")
                for unit in UNITS:
                    log = np.log(base[unit] / own[unit])
                    mean, low, high = np.exp(interval(log))
                    row = dict(zip(NETWORK, network, strict=True))
                    row |= {"optimizer": optimizer, "against": other, "unit": unit, "speed_up": mean}
                    row |= {"low": low, "high": high, "seeds": int(log.notna().sum())}
                    row |= {"reached": int(own["reached"].sum()), "bound": not own["reached"].all()}
                    row |= {"bound_below": not base["reached"].all()}
                    rows.append(row)
    measured = ["optimizer", "against", "unit", "speed_up", "low", "high", "seeds", "reached"]
    measured += ["bound", "bound_below"]
    return pd.DataFrame(rows, columns=[*NETWORK, *measured])


def stable_rates(tables: Tables, reference: str) -> pd.DataFrame:
    """A-X3: largest stable learning rate by network and optimiser: geometric mean over seeds, its range, and the
    ratio to the reference's (paired by seed, 95 % t-interval of the logarithm).

    ``bound``: the ratio is an upper bound, as own runs were never stable on a seed or the reference's were up to the
    largest rate tried; ``bound_below``: a lower one, the other way round.
    """
    found = tables["stability"].copy()
    found["log"] = np.log(found["stable_lr"])
    rows = []
    for key, group in found.groupby([*NETWORK, "optimizer"], sort=False):
        same = (found[NETWORK] == list(key[:-1])).all(axis=1) & (found["optimizer"] == reference)
        reference_rows = found[same]
        base = reference_rows.set_index("seed")["log"]
        row = dict(zip([*NETWORK, "optimizer"], key, strict=True))
        row |= {"stable_lr": np.exp(group["log"].mean())}
        row |= {"lowest": group["stable_lr"].min(), "highest": group["stable_lr"].max()}
        row |= {"seeds": len(group), "never_stable": int(group["stable_lr"].isna().sum())}
        row |= {"open_above": int(group["unstable_lr"].isna().sum())}
        ratio = interval(group.set_index("seed")["log"] - base)
        row["ratio"], row["ratio_low"], row["ratio_high"] = np.exp(ratio)
        row["bound"] = bool(group["stable_lr"].isna().any() or _open_above(reference_rows))
        row["bound_below"] = bool(reference_rows["stable_lr"].isna().any() or _open_above(group))
        rows.append(row)
    return pd.DataFrame(rows).sort_values(
        [*NETWORK, "stable_lr"], ascending=False, na_position="last", ignore_index=True
    )


def _open_above(found: pd.DataFrame) -> bool:
    """Whether, on some seed, the largest rate tried was stable."""
    return bool((found["unstable_lr"].isna() & found["stable_lr"].notna()).any())
