"""Measures of paper C: the small problems of table 1, and what a step costs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from papers.c.small_problems import Problem, Rosenbrock, build_problem
from papers.c.small_solvers import bfgs, solve

Grid = Mapping[str, Sequence[float]]
Setting = dict[str, float]
ORDER = ("sgd", "adam", "levenberg-marquardt", "bfgs", "curveball", "curveball-searched")
"""The rows of table 1, and one of ours: CurveBall with its first λ searched like the others' settings."""


def small_problem(
    context: Any,
    *,
    problem: str,
    runs: int,
    search_runs: int,
    tolerance: float,
    limit: int,
    grids: Mapping[str, Grid],
    seed: int,
    traced: int = 1,
) -> pd.DataFrame:
    """All solvers on one problem: iterations until the noiseless objective is below ``tolerance``.

    Each grid (solver -> setting -> values) is searched on ``search_runs`` runs; the setting of the smallest mean
    count, runs that do not arrive counting ``limit``, then meets ``runs`` fresh ones. Rows by ``stage``:

    - ``search``: one per setting: mean ``iterations`` so counted, ``reached`` (share of runs);
    - ``final``: one per run: ``iterations`` (empty if not reached), ``reached``;
    - ``trajectory``: ``objective`` at each ``iteration`` of the first ``traced`` runs, with u, v where there are two
      parameters.
    """
    rows: list[dict[str, Any]] = []
    for solver in context.progress(ORDER, problem):
        rng = np.random.default_rng([seed, 0])
        best: Setting = {}
        if solver in grids:
            found = list(_search(solver, problem, grids[solver], search_runs, tolerance, limit, rng))
            rows += [{"solver": solver, "stage": "search", **row} for _, row in found]
            best = min(found, key=lambda item: item[1]["iterations"])[0]
        elif solver != "bfgs":
            continue
        rng = np.random.default_rng([seed, 1])
        instance = build_problem(problem, runs, rng)
        counts, paths = _solve(solver, instance, instance.starts(runs, rng), best, tolerance, limit, rng, traced)
        final = {"solver": solver, "setting": _text(best)}
        rows += [
            {**final, "stage": "final", "run": run, "iterations": count, "reached": float(np.isfinite(count))}
            for run, count in enumerate(counts)
        ]
        for run, path in enumerate(paths):
            rows += [{**final, "stage": "trajectory", "run": run, **row} for row in _along(instance, run, path)]
    return pd.DataFrame(rows).assign(problem=problem, tolerance=tolerance, limit=limit)


def _search(
    solver: str, name: str, grid: Grid, runs: int, tolerance: float, limit: int, rng: np.random.Generator
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Every setting of the grid on the same problems and starts, all in one batch."""
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    problem = build_problem(name, runs, rng)
    repeated = np.tile(np.arange(runs), len(settings))
    start = problem.starts(runs, rng)[repeated]
    arrays = {key: np.repeat([s[key] for s in settings], runs) for key in grid}
    counts = solve(solver, problem.take(repeated), start, arrays, rng, tolerance, limit)
    for setting, part in zip(settings, counts.reshape(len(settings), runs), strict=True):
        reached = np.isfinite(part)
        yield (
            setting,
            {
                "setting": _text(setting),
                "iterations": float(np.where(reached, part, limit).mean()),
                "reached": reached.mean(),
            },
        )


def _solve(
    solver: str,
    problem: Problem,
    start: np.ndarray,
    setting: Setting,
    tolerance: float,
    limit: int,
    rng: np.random.Generator,
    traced: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Iteration counts of all runs, and the parameters (T, P) along the first ``traced`` of them."""
    runs = len(start)
    if solver == "bfgs":
        counts, paths = [], []
        for run in range(runs):
            path: list[np.ndarray] = []
            index = np.array([run])
            counts.append(bfgs(problem.take(index), start[index], rng, tolerance, limit, path))
            paths.append(np.concatenate(path))
        return np.array(counts), paths[:traced]
    settings = {key: np.full(runs, value) for key, value in setting.items()}
    trace: list[list[np.ndarray]] = [[] for _ in range(traced)]
    counts_array = solve(solver, problem, start, settings, rng, tolerance, limit, trace)
    return counts_array, [np.stack(path) for path in trace]


def _along(problem: Problem, run: int, path: np.ndarray) -> Iterator[dict[str, Any]]:
    objective = problem.take(np.full(len(path), run)).objective(path)
    for iteration, (w, value) in enumerate(zip(path, objective, strict=True)):
        point = {"u": w[0], "v": w[1]} if isinstance(problem, Rosenbrock) else {}
        yield {"iteration": iteration, "objective": value, **point}


def _text(setting: Setting) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in setting.items())


def step_costs(
    context: Any,
    *,
    dataset: str,
    model: Mapping[str, Any],
    optimizers: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    lr: Mapping[str, float],
    rounds: int,
    reference: str,
    seed: int = 0,
) -> pd.DataFrame:
    """Seconds a step of each optimiser on one network and minibatch, in turn within one process.

    A round is one step of each, five of which make a row, since the damping rule acts at every fifth step. Columns:
    optimizer, round, ``step_s``, ``relative`` (to the median of ``reference``), ``gradient_evaluations`` a step by
    count of passes, and ``parameter_copies``: tensors of the size of the parameters that the optimiser keeps or makes
    in a step beside the parameters (state, and for the others the gradient or direction).
    """
    import torch

    from curvspace import models
    from curvspace.optim import registry
    from curvspace.seeds import replayed_randomness
    from curvspace.training.spec import Block

    data = context.dataset(dataset)
    x = data.normalise(data.train.inputs[:batch_size])
    y = data.train.targets[:batch_size]
    built = {}
    net = Block.of(model)
    for name, values in optimizers.items():
        with replayed_randomness(torch.device("cpu"), seed):
            network = models.build(net.kind, net.options, data.input_shape, data.num_classes).to(context.device)
        block, rate = Block.of(values), lr.get(name, lr["default"])
        built[name] = registry.build(block.kind, block.options, network, data.num_classes, rate)
    rows = []
    for round_ in context.progress(range(-1, rounds), "step costs"):
        for name, optimizer in built.items():
            before = optimizer.costs.gradient_evaluations
            seconds = _time_steps(optimizer, x, y, 5, context.device)
            if round_ >= 0:  # the round before warms up
                evaluations = (optimizer.costs.gradient_evaluations - before) / 5
                rows.append(
                    {"optimizer": name, "round": round_, "step_s": seconds, "gradient_evaluations": evaluations}
                )
    table = pd.DataFrame(rows)
    usual = table.loc[table["optimizer"] == reference, "step_s"].median()
    copies = {name: _parameter_copies(optimizer) for name, optimizer in built.items()}
    return table.assign(
        relative=table["step_s"] / usual,
        parameter_copies=table["optimizer"].map(copies),
        model=net.name,
        dataset=dataset,
        batch_size=batch_size,
    )


def _time_steps(optimizer: Any, x: Any, y: Any, steps: int, device: Any) -> float:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step(x, y)
    wait()
    return (time.perf_counter() - start) / steps


def _parameter_copies(optimizer: Any) -> float:
    """State kept between steps, in sizes of the parameters, plus the gradient or direction of the present step."""
    parameters = optimizer.param_groups[0]["params"]
    size = sum(p.numel() for p in parameters)
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if getattr(v, "ndim", 0))
    return 1 + state / size
