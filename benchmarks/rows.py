"""The rows of the speed table: work, tool, seconds, the ratio and what it is to, and the bar that it should keep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.problem import CLASSES, Problem, best_times, timed
from curvspace import Objective, class_gradients, eigsh, optim, track
from curvspace.curvature import HessianOperator
from curvspace.curvature.eigensolver import Which

Row = dict[str, Any]


def products(problem: Problem, count: int, device: torch.device) -> Iterator[Row]:
    """H v and G v in gradients over the same images, each gradient taken batch-wise as a user's loop would."""
    x, y = problem.take(count)
    objective = Objective(problem.model, [(x, y)])
    H, G = objective.hessian(), objective.gauss_newton()
    again = Objective(problem.model, [(x, y)], engine="recompute").hessian()
    v = torch.randn(H.shape[0], device=device)
    times = best_times(
        {
            "gradient": partial(_gradient, problem.model, x, y),
            "gradient, batches for the cache": objective.gradient,
            "H v": lambda: H @ v,
            "H v, recompute": lambda: again @ v,
            "G v": lambda: G @ v,
        },
        device,
    )
    size = objective.batches[0].size
    for unit in ("gradient", "gradient, batches for the cache"):
        for work, bar in (("H v", 1.5), ("G v", 1.0), ("H v, recompute", None)):
            yield {
                "work": work,
                "tool": "curvspace",
                "seconds": times[work],
                "ratio": times[work] / times[unit],
                "to": unit,
                "bar": bar,
                "note": f"{count} images, {size} at a time",
            }


def eigenpairs(problem: Problem, count: int, device: torch.device, tol: float = 1e-3) -> Iterator[Row]:
    """Top-10 and bottom-3 pairs, whole calls with set-up, true residuals measured on the Hessian in float64."""
    x, y = problem.take(count)
    exact = Objective(problem.model, [(x, y)], dtype=torch.float64, engine="recompute").hessian()
    for k, which, bars in (
        (10, "LA", {"curvlinops": 3.0, "hessian_eigenthings": 2.5, "pyhessian": 8.0}),
        (3, "SA", {"curvlinops": 4.0}),
    ):
        ours: float | None = None
        for name, solver in peers.available().items():
            if name == "pyhessian" and which == "SA":
                continue  # finds magnitudes only
            if name == "hessian_eigenthings":
                peers.steps_to_converge(problem.model, x, y, k, which, tol)
            call = partial(solver, problem.model, x, y, k, which, tol)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if ours is None:
                    call()  # the first call in a process warms it up
                seconds, found = timed(call, device)
                ours = seconds if ours is None else ours
            yield {
                "work": f"{'top' if which == 'LA' else 'bottom'}-{k} eigenpairs",
                "tool": name,
                "seconds": seconds,
                "ratio": seconds / ours,
                "to": "curvspace",
                "bar": bars.get(name),
                "products": found.products,
                **_accuracy(exact, found, which),
                "note": found.note,
            }


def _accuracy(exact: HessianOperator, found: peers.Found, which: str) -> Row:
    """True residuals, relative to the largest magnitude found and each to its own eigenvalue, and the values' ends."""
    u = found.vectors.to(exact.device).double()
    u = u / u.norm(dim=0)
    image = exact @ u
    values = (u * image).sum(0)
    residual = (image - u * values).norm(dim=0)
    ordered = values.sort(descending=which == "LA").values
    return {
        "residual": float(residual.max() / values.abs().max()),
        "residual_own": float((residual / values.abs()).max()),
        "value_first": float(ordered[0]),
        "value_last": float(ordered[-1]),
    }


def tracking(problem: Problem, count: int, device: torch.device) -> Iterator[Row]:
    """Products along checkpoints ten steps apart, each solve started from the last, and from scratch."""
    x, y = problem.take(count)

    def operators() -> Iterator[Any]:
        model = copy.deepcopy(problem.model)
        for state in problem.checkpoints:
            model.load_state_dict(state)
            yield Objective(model, [(x, y)]).hessian()

    settings: tuple[tuple[int, Which, float], ...] = ((10, "LA", 1e-3), (10, "LA", 1e-2), (3, "SA", 1e-3))
    for k, which, tol in settings:
        warm = [pairs.products for pairs in track(operators(), k, which, tol)]
        cold = [eigsh(H, k, which, tol).products for H in operators()]
        yield {
            "work": f"tracked {'top' if which == 'LA' else 'bottom'}-{k}, tol {tol:g}",
            "tool": "curvspace",
            "ratio": sum(warm[1:]) / sum(cold[1:]),
            "to": "products of cold starts",
            "bar": 0.5,
            "products": sum(warm[1:]),
            "note": f"warm {warm}, cold {cold}",
        }


def class_gradient_pass(problem: Problem, count: int, device: torch.device) -> Iterator[Row]:
    """All class gradients in gradients over the same batch."""
    for size in (128, 512, count):
        x, y = problem.take(size)
        works = {"gradient": partial(_gradient, problem.model, x, y)}
        for method in ("split", "vjp"):
            works[method] = partial(class_gradients, problem.model, x, y, CLASSES, method)  # type: ignore[assignment]
        times = best_times(works, device, repeats=20 if size < 1000 else 5)
        for method, bar in (("split", 1.3), ("vjp", None)):
            yield {
                "work": f"class gradients, {method}, batch {size}",
                "tool": "curvspace",
                "seconds": times[method],
                "ratio": times[method] / times["gradient"],
                "to": "gradient",
                "bar": bar,
                "note": "",
            }


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def steps(problem: Problem, device: torch.device) -> Iterator[Row]:
    """One step of each optimiser in steps of SGD, for small and large minibatches, the mean over those of an epoch."""
    kinds: dict[str, tuple[str, dict[str, Any], float | None]] = {
        "sgd": ("sgd", {}, None),
        "class gradients": ("class-gradient-newton", {}, 2.0),
        "class gradients, refreshed every 10": ("class-gradient-newton", {"refresh_every": 10}, 1.2),
        "Rayleigh-Ritz, refreshed every 10": ("rayleigh-ritz-newton", {"refresh_every": 10, "fraction": 0.25}, 1.2),
        "span dropped, refreshed every 10": ("bulk-sgd", {"refresh_every": 10, "span": "class-gradients"}, None),
        "low rank, refreshed every 20": ("low-rank-newton", {"refresh_every": 20}, None),
        "CurveBall": ("curveball", {}, 2.5),
    }
    for batch in (128, 512):
        x, y = problem.take(20 * batch)
        parts = list(zip(x.split(batch), y.split(batch), strict=True))
        repeated = -(-20 // len(parts))
        runs = {}
        for name, (kind, options, _) in kinds.items():
            model = copy.deepcopy(problem.model)
            optimizer = optim.build(kind, options, model, CLASSES, 1.0 if kind == "curveball" else 1e-3)

            def epoch(optimizer: Any = optimizer, parts: Any = parts, repeated: int = repeated) -> None:
                for part, labels in repeated * parts:
                    optimizer.step(part, labels)

            runs[name] = epoch
        times = best_times(runs, device, repeats=4)
        for name, (_, _, bar) in kinds.items():
            yield {
                "work": f"step: {name}, batch {batch}",
                "tool": "curvspace",
                "seconds": times[name] / (repeated * len(parts)),
                "ratio": times[name] / times["sgd"],
                "to": "SGD step",
                "bar": bar,
                "note": "",
            }
