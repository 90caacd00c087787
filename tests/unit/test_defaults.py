"""Everything is computed alike whatever torch's default type and device are: only the model's and the data's count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from curvspace import LossScanner, Objective, class_gradients, eigsh, optim, spectral_density
from curvspace.curvature import dense_matrix, gram_eigh, hutchpp, projected_gauss_newton
from curvspace.curvature.class_gradients import cross_class_gradients
from curvspace.landscape import fit_quadratic, line_search
from curvspace.monitor import CurvatureMonitor
from curvspace.subspace import cosine_assignment, principal_angles, subspace_overlap, union_rank

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(20) % 3
Q = torch.randn(43, 3, generator=torch.Generator().manual_seed(2)).double()
WEIGHTS = 0.5 * torch.randn(43, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"], ids=str)
def another_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Another default, set by a call. A device without numbers stands for every one that is not the model's."""
    setter = torch.set_default_device if isinstance(request.param, str) else torch.set_default_dtype
    before: Any = torch.get_default_device() if isinstance(request.param, str) else torch.get_default_dtype()
    yield lambda: setter(request.param)
    setter(before)


def _mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    nn.utils.vector_to_parameters(WEIGHTS.clone(), model.parameters())
    return model


def _steps(make: Callable[..., Any], *args: Any, **options: Any) -> Callable[[nn.Module], Any]:
    def run(model: nn.Module) -> list[float]:
        opt = make(model, *args, **options)
        return [float(opt.step(X, Y)) for _ in range(2)]

    return run


def _objective(model: nn.Module, **options: Any) -> Objective:
    return Objective(model, [(X[:9], Y[:9]), (X[9:], Y[9:])], **options)


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "loss": lambda m: _objective(m).loss(),
    "parts": lambda m: _objective(m, microbatch=4).gradient(),
    "callable, parts": lambda m: _objective(
        m, loss=lambda z, y: nn.functional.cross_entropy(z, y), microbatch=4
    ).loss(),
    "Hessian": lambda m: _objective(m).hessian() @ Q,
    "Gauss-Newton": lambda m: _objective(m).gauss_newton() @ Q,
    "Fisher": lambda m: _objective(m).empirical_fisher() @ Q,
    "differences": lambda m: _objective(m).hessian_by_differences() @ Q,
    "dense": lambda m: dense_matrix(_objective(m).hessian()),
    "eigsh": lambda m: eigsh(_objective(m).hessian(), 4, "BE").values,
    "eigsh from a subspace": lambda m: eigsh(_objective(m).hessian(), 3, v0=Q).values,
    "Gram": lambda m: gram_eigh(_objective(m).gauss_newton())[0],
    "density": lambda m: spectral_density(_objective(m).hessian(), steps=10).density,
    "trace": lambda m: hutchpp(_objective(m).hessian(), 12).value,
    "class gradients": lambda m: class_gradients(m, X, Y, 3)[0],
    "cross-class gradients": lambda m: cross_class_gradients(m, X, Y, 3)[0],
    "projected": lambda m: projected_gauss_newton(m, X, Y, "cross_entropy", Q),
    "scan": lambda m: torch.as_tensor(LossScanner(_objective(m)).along(Q[:, 0], [0.1, 0.2]), device="cpu"),
    "fit": lambda m: fit_quadratic(LossScanner(_objective(m)), Q[:, 0], 0.1).curvature,
    "line search": lambda m: line_search(LossScanner(_objective(m)), Q[:, 0] / Q[:, 0].norm(), 2.0).t,
    "subspaces": lambda m: [principal_angles(Q, Q + 0.1), cosine_assignment(Q, Q.flip(1)).columns],
    "overlap": lambda m: [subspace_overlap(Q, Q + 1), union_rank(Q, Q[:, :2]).rank],
    "class_gradient_newton": _steps(optim.class_gradient_newton, num_classes=3, lr=0.1),
    "rayleigh_ritz_newton": _steps(optim.rayleigh_ritz_newton, num_classes=3, lr=0.1, refresh_every=1),
    "low_rank_newton": _steps(optim.low_rank_newton, k=3, lr=0.1),
    "CurveBall": _steps(optim.CurveBall),
    "LevenbergMarquardt": _steps(optim.LevenbergMarquardt, "cross_entropy"),
    "NegativeCurvature": _steps(optim.NegativeCurvature, base=torch.optim.RMSprop, lr=0.01),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_the_defaults_of_torch_do_not_matter(name, another_default):
    compute, models = COMPUTED[name], [_mlp(), _mlp()]
    expected = compute(models[0])
    another_default()
    torch.testing.assert_close(compute(models[1]), expected, rtol=1e-10, atol=1e-12)


def test_a_monitor_under_another_default(another_default):
    model = _mlp()
    expected = eigsh(Objective(model, [(X, Y)]).hessian(), 1).values.item()
    another_default()
    monitor = CurvatureMonitor(model, [(X, Y)], num_classes=3, k=2, share=None)
    assert monitor.measure(0)["sharpness"] == pytest.approx(expected, rel=1e-2)
