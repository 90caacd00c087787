"""Measures of paper D: both ends of the Hessian's spectrum, and the loss along their directions.

Pure functions from a run's checkpoints to tidy tables. Curvature and scans act on a fixed random part of the training
set (``fraction``, the same examples at every checkpoint), in eval mode. LA(k) are the k largest eigenpairs, SA(k) the
k most negative ones; ``index`` counts from 1 at the extreme.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from curvspace.curvature.class_gradients import class_gradients
from curvspace.curvature.eigensolver import EigenPairs, Which, eigsh
from curvspace.curvature.operators import HessianOperator
from curvspace.curvature.tracker import SubspaceTracker
from curvspace.errors import UserError
from curvspace.inner import inner, norm
from curvspace.landscape import LossScanner, fit_quadratic, line_search
from curvspace.objective import Objective
from curvspace.subspace import gradient_fraction, principal_angles
from papers.common.runs import tidy

if TYPE_CHECKING:
    from curvspace.training.record import RunRecord
    from papers.common.context import Context

Row = dict[str, Any]
READINGS = ("eq. 1", "unit")
"""What α multiplies: (gᵀv) v as eq. 1 is printed, or the unit vector v. The paper's figures 3 and 4 do not say."""


def fixed_subset(
    context: Context, run: RunRecord, fraction: float, batch_size: int = 500
) -> list[tuple[Tensor, Tensor]]:
    """The same random part of the run's training set at every call, as batches."""
    data = context.dataset(run)
    return data.batches(data.train.take(max(1, round(fraction * len(data.train))), seed=0), batch_size)


def objective_at(context: Context, run: RunRecord, step: int, fraction: float) -> Objective:
    """The loss on the fixed subset, at the checkpoint after ``step`` steps."""
    if step not in run.steps:
        raise UserError(f"{run.path} has no checkpoint at step {step}; it has {run.steps}")
    return Objective(context.model(run, step), fixed_subset(context, run, fraction), loss=run.spec["task"]["loss"])


class TwoEnds:
    """LA(top) and SA(bottom) of one Hessian after another, each solve started from the last one's vectors."""

    def __init__(self, top: int, bottom: int, tol: float):
        ends: tuple[tuple[Which, int], ...] = (("LA", top), ("SA", bottom))
        self.trackers = {end: SubspaceTracker(k, end, tol) for end, k in ends if k}

    def update(self, hessian: HessianOperator) -> dict[str, EigenPairs]:
        """``{"LA": …, "SA": …}``, the ends that were asked for."""
        return {end: tracker.update(hessian) for end, tracker in self.trackers.items()}


def spectrum(context: Context, top: int, bottom: int, fraction: float, tol: float = 1e-2) -> pd.DataFrame:
    """D-F1: LA(top) and SA(bottom) at every checkpoint. One row a (step, end, index)."""
    (run,) = context.runs
    ends = TwoEnds(top, bottom, tol)
    rows: list[Row] = []
    for step in context.progress(run.steps, "spectrum"):
        objective = objective_at(context, run, step, fraction)
        found = ends.update(objective.hessian())
        common = {"step": step, "examples": objective.num_examples, "subset_loss": objective.loss()}
        rows += [common | row for end, pairs in found.items() for row in pair_rows(end, pairs)]
    return tidy(run, rows)


def pair_rows(end: str, pairs: EigenPairs) -> list[Row]:
    """One row for each eigenpair of one end."""
    return [
        {"end": end, "index": i + 1, "eigenvalue": float(value), "residual": float(residual)}
        | {"products": pairs.products, "converged": pairs.converged}
        for i, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True))
    ]


def fixed_directions(
    context: Context, top_steps: Sequence[int], bottom_steps: Sequence[int], fraction: float, tol: float = 1e-2
) -> pd.DataFrame:
    r"""D-F2: the curvature :math:`v(t_0)^\top H(t)\, v(t_0)` along a direction found at t0, at every checkpoint t.

    v is the first of LA at each of ``top_steps`` and the first of SA at each of ``bottom_steps``.
    """
    (run,) = context.runs
    origins: list[tuple[str, int]] = [("LA", t) for t in top_steps] + [("SA", t) for t in bottom_steps]
    columns = []
    for end, origin in context.progress(origins, "directions"):
        hessian = objective_at(context, run, origin, fraction).hessian()
        columns.append(TwoEnds(int(end == "LA"), int(end == "SA"), tol).update(hessian)[end].vectors[:, 0])
    directions = torch.stack(columns, dim=1)
    rows: list[Row] = []
    for step in context.progress(run.steps, "their curvature"):
        objective = objective_at(context, run, step, fraction)
        curvatures = (directions * (objective.hessian() @ directions)).sum(0).tolist()
        rows += [
            {"step": step, "examples": objective.num_examples, "end": end, "origin_step": origin, "curvature": value}
            for (end, origin), value in zip(origins, curvatures, strict=True)
        ]
    return tidy(run, rows)


def profiles(
    context: Context, step: int, radii: Sequence[float], fraction: float, points: int = 41, tol: float = 1e-2
) -> pd.DataFrame:
    r"""D-F3: the loss along v_1 and v_d against :math:`L + s t + \tfrac12\lambda t^2`, where :math:`s = g^\top v`.

    In both :data:`READINGS` of α, within each of ``radii``; one row a (end, reading, radius, alpha).
    """
    (run,) = context.runs
    objective = objective_at(context, run, step, fraction)
    gradient, scanner = objective.gradient(), LossScanner(objective)
    rows: list[Row] = []
    for end, pairs in TwoEnds(1, 1, tol).update(objective.hessian()).items():
        v, value = pairs.vectors[:, 0], float(pairs.values[0])
        slope = float(inner(gradient, v))
        for reading in READINGS:
            for radius in radii:
                alpha = np.linspace(-radius, radius, points)
                t = -alpha * (slope if reading == "eq. 1" else np.sign(slope) or 1.0)
                loss = scanner.along(v, t)
                model = scanner.origin_loss + slope * t + 0.5 * value * t**2
                rows += [
                    {"step": step, "examples": objective.num_examples, "end": end, "eigenvalue": value, "slope": slope}
                    | {"reading": reading, "radius": radius, "alpha": a, "loss": actual, "quadratic": predicted}
                    for a, actual, predicted in zip(alpha, loss, model, strict=True)
                ]
    return tidy(run, rows)


def directions(
    context: Context,
    step: int,
    top: int,
    bottom: int,
    classes: int,
    random: int,
    radii: Sequence[float],
    search_radius: float,
    fraction: float,
    tol: float = 1e-2,
    fit_points: int = 9,
    search_points: int = 14,
) -> pd.DataFrame:
    r"""D-F4, D-F5, D-F6, D-X2: fits and line searches along many directions at one checkpoint.

    One row a (kind, index), kind one of "LA", "SA", "class gradient", "random". Columns:

    - curvature :math:`v^\top H v` (for LA and SA the eigenvalue), slope :math:`g^\top v`, loss at the checkpoint;
    - for each radius, ``fit_scaled_{radius}`` and ``fit_unit_{radius}``: the curvature of a quadratic fit over
      :math:`|\alpha| \le` radius, α multiplying (gᵀv) v or v; empty where the quadratic part drowns in rounding;
    - the line search over displacements up to ``search_radius``: ``displacement`` t*, ``inverse_alpha``
      :math:`1/\alpha^* = -g^\top v/t^*` (empty where nothing improves), ``improvement``, ``improves``, ``at_edge``;
    - ``evaluations``, ``scan_s``: what that took.
    """
    (run,) = context.runs
    objective = objective_at(context, run, step, fraction)
    gradient, scanner = objective.gradient(), LossScanner(objective)
    found = list(_named_directions(context, run, objective, TwoEnds(top, bottom, tol), classes, random))
    rows: list[Row] = []
    for kind, index, v, curvature in context.progress(found, f"scans at step {step}"):
        before = scanner.evaluations, scanner.seconds
        slope = float(inner(gradient, v))
        row: Row = {"step": step, "examples": objective.num_examples, "loss": scanner.origin_loss, "kind": kind}
        row |= {"index": index, "curvature": curvature, "slope": slope}
        for radius in radii:
            for name, reach in (("scaled", radius * abs(slope)), ("unit", radius)):
                fit = fit_quadratic(scanner, v, reach, fit_points)
                row[f"fit_{name}_{radius:g}"] = fit.curvature if fit.resolved else np.nan
        search = line_search(scanner, v, search_radius, search_points)
        row |= {"displacement": search.t, "inverse_alpha": -slope / search.t if search.improves else np.nan}
        row |= {"improvement": search.improvement, "improves": search.improves, "at_edge": search.at_edge}
        row |= {"search_radius": search_radius}
        row |= {"evaluations": scanner.evaluations - before[0], "scan_s": scanner.seconds - before[1]}
        rows.append(row)
    return tidy(run, rows)


def _named_directions(
    context: Context, run: RunRecord, objective: Objective, ends: TwoEnds, classes: int, random: int
) -> Iterator[tuple[str, int, Tensor, float]]:
    """(kind, index, unit vector, curvature along it) of each direction to scan."""
    hessian = objective.hessian()
    for end, pairs in ends.update(hessian).items():
        for i, value in enumerate(pairs.values.tolist()):
            yield end, i + 1, pairs.vectors[:, i], value
    others: list[tuple[str, Tensor]] = []
    if classes:
        x, y = (torch.cat(parts) for parts in zip(*((b.inputs, b.targets) for b in objective.batches), strict=True))
        gradients, _ = class_gradients(objective.model, x, y, num_classes=context.dataset(run).num_classes)
        others += [("class gradient", row) for row in gradients[gradients.norm(dim=1) > 0][:classes]]
    generator = torch.Generator().manual_seed(0)
    others += [("random", torch.randn(hessian.shape[0], generator=generator)) for _ in range(random)]
    counts: dict[str, int] = {}
    for kind, vector in others:
        counts[kind] = counts.get(kind, 0) + 1
        v = vector.to(objective.function.device, objective.function.dtype)
        v = v / norm(v)
        yield kind, counts[kind], v, float(inner(v, hessian @ v))


def solver_costs(
    context: Context, step: int, top: int, bottom: int, fraction: float, tol: float = 1e-2
) -> pd.DataFrame:
    """D-C1: Hessian products for LA(top) and for SA(bottom), by ARPACK (the paper's solver) and by ours.

    Both have the same tolerance, relative to each eigenvalue, and a cold start.
    """
    from scipy.sparse.linalg import eigsh as arpack

    (run,) = context.runs
    objective = objective_at(context, run, step, fraction)
    start = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0)).numpy()
    ends: list[tuple[Which, int]] = [("LA", top), ("SA", bottom)]
    rows: list[Row] = []
    for end, k in context.progress(ends, "solvers"):
        hessian = objective.hessian()
        with _timed() as clock:
            values, vectors = arpack(hessian.to_scipy(), k, which=end, tol=tol, v0=start.astype(_numpy_type(hessian)))
        products = hessian.products
        residual = hessian @ torch.as_tensor(vectors) - torch.as_tensor(vectors * values).to(hessian.device)
        found = [("ARPACK", values, products, float(residual.norm(dim=0).max()), clock[0])]
        hessian = objective.hessian()
        with _timed() as clock:
            ours = eigsh(hessian, k, end, tol=tol, max_products=5000)
        found.append(("curvspace", ours.values.cpu().numpy(), ours.products, float(ours.residuals.max()), clock[0]))
        rows += [
            {"step": step, "examples": objective.num_examples, "end": end, "k": k, "solver": solver}
            | {"products": count, "wall_s": seconds, "tol": tol, "largest_residual": worst}
            | {"smallest_eigenvalue": float(np.min(v)), "largest_eigenvalue": float(np.max(v))}
            for solver, v, count, worst, seconds in found
        ]
    return tidy(run, rows)


def _numpy_type(operator: HessianOperator) -> np.dtype:
    return torch.empty(0, dtype=operator.dtype).numpy().dtype


@contextmanager
def _timed() -> Iterator[list[float]]:
    """Seconds spent inside, in the list's one entry after the block."""
    seconds, start = [0.0], time.perf_counter()
    yield seconds
    seconds[0] = time.perf_counter() - start


def subset_agreement(context: Context, step: int, k: int, fraction: float, tol: float = 1e-2) -> pd.DataFrame:
    """D-C2: LA(k) and SA(k) on a part of the training set against all of it.

    One row a (end, index): both eigenvalues, the angle between the two eigenvectors in degrees (90 for unrelated
    ones), and the index-th principal angle between the two spans.
    """
    (run,) = context.runs
    ends = TwoEnds(k, k, tol)
    small = objective_at(context, run, step, fraction)
    whole = objective_at(context, run, step, 1.0)
    part = ends.update(small.hessian())
    full = ends.update(whole.hessian())  # started from the part's vectors, which changes the cost alone
    rows: list[Row] = []
    for end in ("LA", "SA"):
        cosines = (part[end].vectors * full[end].vectors).sum(0).abs().clamp(max=1.0)
        angles = torch.rad2deg(torch.arccos(cosines)).tolist()
        principal = torch.rad2deg(principal_angles(part[end].vectors, full[end].vectors)).tolist()
        for i in range(k):
            rows.append(
                {"step": step, "end": end, "index": i + 1, "part_examples": small.num_examples}
                | {"all_examples": whole.num_examples, "part_eigenvalue": float(part[end].values[i])}
                | {"all_eigenvalue": float(full[end].values[i]), "angle_deg": angles[i]}
                | {"principal_angle_deg": principal[i], "part_residual": float(part[end].residuals[i])}
                | {"all_residual": float(full[end].residuals[i])}
            )
    return tidy(run, rows)


def running_estimate(context: Context, bottom: int, fraction: float, tol: float = 2e-2) -> pd.DataFrame:
    r"""D-X1: the optimiser's running pair :math:`(\tilde\lambda, \tilde v)` against the true one, along its runs.

    One row a (run, checkpoint). ``estimate`` is :math:`\tilde\lambda`, from minibatches; ``curvature`` is
    :math:`\tilde v^\top H \tilde v` on the fixed subset; ``eigenvalue`` the true λ_d there; ``cosine``
    :math:`|\tilde v^\top v_d|` and ``share`` :math:`|Q^\top \tilde v|^2` with Q = SA(bottom), whose values for a
    random direction are ``null_cosine`` and ``null_share``; ``minibatch_eigenvalue`` the most negative eigenvalue of
    one minibatch's own Hessian, which the estimate is drawn towards.
    """
    rows = []
    for run in context.runs:
        ends = TwoEnds(1, bottom, tol)
        data = context.dataset(run)
        for step in context.progress([s for s in run.steps if s > 0], "running estimate"):
            extra = run.checkpoint(step, context.device)["optimizer"]["extra"]
            objective = objective_at(context, run, step, fraction)
            hessian, v = objective.hessian(), extra["v"]
            pairs = ends.update(hessian)["SA"]
            batch = data.batches(data.train.take(run.spec["batch_size"], seed=step + 1), len(data.train))
            own = TwoEnds(0, 1, 0.1).update(Objective(objective.model, batch, objective.loss_function).hessian())
            size = hessian.shape[0]
            rows.append(
                {**run.identity, "step": step, "examples": objective.num_examples, "estimate": float(extra["value"])}
                | {"curvature": float(inner(v, hessian @ v)), "eigenvalue": float(pairs.values[0])}
                | {"cosine": float(inner(v, pairs.vectors[:, 0]).abs()), "null_cosine": (2 / (np.pi * size)) ** 0.5}
                | {"share": gradient_fraction(v, pairs.vectors), "null_share": bottom / size, "bottom": bottom}
                | {"minibatch_eigenvalue": float(own["SA"].values[0])}
            )
    return pd.DataFrame(rows)


def scan_speed(context: Context, fraction: float, chunks: Sequence[int], points: int = 16) -> pd.DataFrame:
    """D-C3: loss evaluations per second along a random direction, point after point and batched over points."""
    (run,) = context.runs
    objective = objective_at(context, run, run.steps[-1], fraction)
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0)).to(objective.gradient())
    rows: list[Row] = []
    for method, chunk in [("loop", 1), *(("vmap", chunk) for chunk in chunks)]:
        scanner = LossScanner(objective, "loop" if method == "loop" else "vmap", chunk)
        scanner.along(v, [0.0] * chunk)  # the first pass at a shape sets up kernels
        scanner.evaluations, scanner.seconds = 0, 0.0
        scanner.along(v / norm(v), np.linspace(-1, 1, points))
        rows.append(
            {"method": method, "points_at_once": chunk, "examples": objective.num_examples}
            | {"parameters": objective.num_parameters, "evaluations_per_s": scanner.evaluations_per_second}
            | {"device": str(context.device), "threads": torch.get_num_threads()}
        )
    return tidy(run, rows)
