"""Layer by layer: Hessian and Gauss-Newton products against central differences of gradients and outputs, in float64.

Differences, not double backward: torch's own second derivative is wrong for some layers (weight normalisation).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvspace import Objective
from tests.unit.layers import LAYERS, WITHOUT_SECOND_DERIVATIVE, problem
from tests.unit.oracles import central_difference, jacobian_product


@pytest.mark.parametrize(("make", "inputs"), LAYERS.values(), ids=LAYERS.keys())
def test_products_are_central_differences(make, inputs):
    model, x, y = problem(make, inputs)
    for m in model.modules():
        m.train(isinstance(m, nn.modules.batchnorm._BatchNorm))
    objective = Objective(model, (x, y))
    H, G = objective.hessian(), objective.gauss_newton()
    torch.manual_seed(0)
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    V /= V.norm(dim=0)
    products = H @ V
    expected = central_difference(model, [(x, y)], "cross_entropy", V[:, 0])
    assert (products[:, 0] - expected).norm() < 1e-6 * expected.norm() + 1e-9
    assert abs(V[:, 1] @ products[:, 0] - V[:, 0] @ products[:, 1]) < 1e-12
    H.vectors_at_once = 2
    torch.testing.assert_close(H @ V, products, rtol=0, atol=1e-12)
    jv, p = jacobian_product(model, x, V[:, 0]), model(x).detach().softmax(1)
    curvature = (jv * (p * jv - p * (p * jv).sum(1, keepdim=True))).sum() / len(x)
    assert abs(V[:, 0] @ (G @ V[:, 0]) - curvature) < 1e-6 * curvature


@pytest.mark.parametrize(("make", "inputs"), WITHOUT_SECOND_DERIVATIVE.values(), ids=WITHOUT_SECOND_DERIVATIVE.keys())
def test_layers_without_second_derivative_are_errors_and_differences_serve(make, inputs):
    model, x, y = problem(make, inputs)
    objective = Objective(model, (x, y))
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    v /= v.norm()
    with pytest.raises(RuntimeError, match="not implemented"):
        objective.hessian() @ v
    expected = central_difference(model, [(x, y)], "cross_entropy", v)
    torch.testing.assert_close(objective.hessian_by_differences() @ v, expected, rtol=1e-6, atol=1e-9)


class Slope(nn.Module):
    """A network's derivative in its inputs."""

    def __init__(self, layer: nn.Module, way: str):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), layer, nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "grad":
            return torch.func.grad(lambda x: self.net(x).sum())(x)
        if self.way == "vmap of grad":
            return torch.func.vmap(torch.func.grad(lambda x: self.net(x[None]).sum()))(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def _convolutions() -> nn.Module:
    layers = nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.ConvTranspose1d(2, 1, 3, padding=1)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), *layers)


SLOPES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "convolutions": _convolutions,
    "stored statistics": lambda: nn.BatchNorm1d(4).eval(),
    "batch statistics": lambda: nn.BatchNorm1d(4),
    "batch statistics, no weights": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "layer norm": lambda: nn.LayerNorm(4),
    "layer norm, no bias": lambda: nn.LayerNorm(4, bias=False),
    "layer norm, no weights": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("way", ["autograd", "grad", "vmap of grad"])
@pytest.mark.parametrize("name", SLOPES)
def test_layers_that_the_model_differentiates(name, way):
    if name == "batch statistics" and way != "autograd":
        pytest.skip("torch.func refuses to write running statistics")
    if name.startswith("batch statistics") and way == "vmap of grad":
        pytest.skip("one example has no statistics")
    torch.manual_seed(0)
    model, x, y = Slope(SLOPES[name](), way).double(), torch.randn(7, 6).double(), torch.randn(7, 6).double()
    objective = Objective(model, (x, y), "mse")
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    expected = central_difference(model, [(x, y)], "mse", v)
    assert (objective.hessian() @ v - expected).norm() < 1e-6 * expected.norm()
    jv = jacobian_product(model, x, v)
    assert float(v @ (objective.gauss_newton() @ v)) == pytest.approx(float((jv * jv).sum() / 7), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jacobian_that_is_nothing_but_rounding(dtype):
    """Batch statistics take the bias before them away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    G = Objective(model, (torch.randn(9, 4), torch.randint(3, (9,))), parameters="0.bias", dtype=dtype).gauss_newton()
    assert (G @ torch.ones(5)).norm() < 1e-10
