"""How the cost of a product and of eigenpairs grows with the data, with P and with k."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks.peers import TimedOperator
from benchmarks.problem import CLASSES, Problem, images, timed
from curvspace import Objective, eigsh, models

Row = dict[str, Any]


def _one(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, k: int, device: torch.device) -> Row:
    objective = Objective(model, [(x, y)])
    gradient = min(timed(objective.gradient, device)[0] for _ in range(2))
    H = objective.hessian()
    v = torch.ones(H.shape[0], device=device)
    setup, _ = timed(lambda: H @ v, device)
    product = min(timed(lambda: H @ v, device)[0] for _ in range(2))
    row = {
        "images": len(x),
        "parameters": H.shape[0],
        "k": k,
        "gradient_s": gradient,
        "first_product_s": setup,
        "product_s": product,
        "ratio": product / gradient,
        "images_at_once": objective.batches[0].size,
        "kept_batches": len(H._kept),
        "batches": len(H.batches),
    }
    if k:
        counted, start = TimedOperator(H), process_time()
        row["eigsh_s"], pairs = timed(lambda: eigsh(counted, k), device)  # type: ignore[arg-type]
        row["products"] = pairs.products  # type: ignore[attr-defined]
        row["solver_share"] = 1 - counted.seconds / (process_time() - start)
    return row


def with_data(problem: Problem, folder: Path, counts: list[int], device: torch.device) -> Iterator[Row]:
    x, y = images(folder, max(counts), device)
    for count in counts:
        yield {"grows": "images", **_one(problem.model, x[:count], y[:count], 0, device)}


def with_parameters(problem: Problem, count: int, device: torch.device) -> Iterator[Row]:
    x, y = problem.take(count)
    networks: dict[str, dict[str, Any]] = {"cnn-400": {}, "cnn-60k": {}, "lenet": {}, "resnet9": {}}
    for kind, options in networks.items():
        torch.manual_seed(0)
        model = models.build(kind, options, (3, 32, 32), CLASSES).to(device).eval()
        yield {"grows": "parameters", "network": kind, **_one(model, x, y, 10, device)}


def with_k(problem: Problem, count: int, device: torch.device) -> Iterator[Row]:
    x, y = problem.take(count)
    for k in (1, 3, 10, 30):
        yield {"grows": "k", **_one(problem.model, x, y, k, device)}
