"""Inside inference mode, autocast and a cache of parametrised weights everything is as outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from curvspace import Objective, class_gradients, eigsh
from curvspace.curvature import (
    dense_matrix,
    gram_eigh,
    hutchpp,
    projected_gauss_newton,
    spectral_density,
)
from curvspace.landscape import LossScanner
from curvspace.monitor import CurvatureMonitor
from tests.unit.small_networks import minibatch, mlp

COMPUTATIONS: dict[str, Callable[[Objective], Any]] = {
    "loss": lambda o: o.loss(),
    "gradient": lambda o: o.gradient(),
    "Hessian": lambda o: o.hessian() @ torch.ones(o.num_parameters).double(),
    "Gauss-Newton": lambda o: o.gauss_newton() @ torch.ones(o.num_parameters).double(),
    "class gradients": lambda o: class_gradients(o.model, *minibatch(9), 3)[0],
    "eigsh": lambda o: eigsh(o.hessian(), 2).values,
    "Gauss-Newton eigsh": lambda o: eigsh(o.gauss_newton(), 2).values,
    "differences": lambda o: o.hessian_by_differences() @ torch.ones(o.num_parameters).double(),
    "Fisher": lambda o: o.empirical_fisher() @ torch.ones(o.num_parameters, 2).double(),
    "density": lambda o: spectral_density(o.hessian(), steps=5, probes=2).density,
    "trace": lambda o: hutchpp(o.hessian(), 9).value,
    "gram_eigh": lambda o: gram_eigh(o.gauss_newton())[0],
    "dense": lambda o: dense_matrix(o.hessian()),
    "projected": lambda o: projected_gauss_newton(
        o.model, *minibatch(), "cross_entropy", torch.eye(o.num_parameters).double()[:, :3]
    ),
    "monitor": lambda o: CurvatureMonitor(o.model, [minibatch()], k=1, share=None).measure(0)["sharpness"],
    "landscape": lambda o: LossScanner(o).along(torch.ones(o.num_parameters).double(), [0.0, 0.1]),
}


@pytest.mark.parametrize("n", [9, 300])
@pytest.mark.parametrize("inside", ["nothing", "inputs", "batch", "batch and model"])
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_every_computation_leaves_inference_mode(name, inside, n):
    model, batch = mlp(), minibatch(n)
    expected = COMPUTATIONS[name](Objective(model, batch))
    with torch.inference_mode():
        model = mlp() if inside == "batch and model" else model
        if inside == "inputs":
            batch = minibatch(n)[0], batch[1]
        elif inside != "nothing":
            batch = minibatch(n)
        found = COMPUTATIONS[name](Objective(model, batch))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_frozen_model_made_in_inference_mode_has_nothing_to_differentiate_in():
    with torch.inference_mode():
        model = nn.Linear(4, 3).double().requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=True"):
        Objective(model, minibatch())


def test_curvature_inside_autocast_is_that_of_the_parameters_type():
    torch.manual_seed(0)
    model, (x, y), v = nn.Linear(4, 3), minibatch(), torch.randn(15)
    x = x.float()
    objective = Objective(model, (x, y))

    def quantities() -> list[Tensor]:
        H, G = objective.hessian(), objective.gauss_newton()
        return [
            *[objective.gradient(), H @ v, G @ v, gram_eigh(G)[0], torch.tensor(hutchpp(H, 9).value)],
            spectral_density(H, steps=5, probes=2).nodes,
            projected_gauss_newton(model, x, y, "cross_entropy", v[:, None]),
        ]

    expected = quantities()
    with torch.autocast("cpu", torch.bfloat16):
        found = quantities()
        assert eigsh(objective.hessian(), 2).converged
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


@pytest.mark.parametrize("warm", [False, True])
def test_inside_a_cache_of_parametrised_weights(warm):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(), minibatch()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    objective = Objective(model, (x, y))
    v = torch.randn(objective.num_parameters).double()
    computations: list[Callable[[], Tensor]] = [
        objective.gradient,
        lambda: objective.hessian() @ v,
        lambda: objective.gauss_newton() @ v,
        lambda: objective.hessian_by_differences() @ v,
        lambda: class_gradients(model, x, y, 3)[0],
    ]
    expected = [compute() for compute in computations]
    with parametrize.cached():
        kept = model[0].weight if warm else None
        for compute, value in zip(computations, expected, strict=True):
            torch.testing.assert_close(compute(), value, rtol=0, atol=0)
        assert not warm or model[0].weight is kept
