"""Under which of torch's settings a GPU computes: all digits of float32, kernels that have all derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvspace import LossScanner, Objective, class_gradients
from curvspace.curvature import (
    projected_gauss_newton,
)
from curvspace.denormals import is_flushing
from curvspace.optim import CurveBall, NegativeCurvature
from tests.unit.simulated_gpu import on_gpu

SEEN: list[tuple[bool, str, str, bool]] = []
"""Of each call of a :class:`Spy`; what a model itself keeps of an evaluation is undone."""


class Spy(nn.Module):
    """Notes under which of torch's settings it is called, and by which a gradient comes back."""

    def __init__(self, recurrent: bool = False):
        super().__init__()
        SEEN.clear()
        self.inner: nn.Module = nn.GRU(3, 4, batch_first=True) if recurrent else nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        z = self.inner(x)
        z = z[0][:, -1] if isinstance(z, tuple) else z
        if z.requires_grad:
            z.register_hook(self.note)
        return self.head(z)

    def note(self, of: Tensor) -> None:
        backends = torch.backends
        matmul, conv = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
        if of.dtype == torch.float32:  # some checks are in float64
            SEEN.append((backends.cudnn.enabled, matmul, conv, is_flushing()))


WORK: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "loss": lambda m, x, y: Objective(m, (x, y)).loss(),
    "gradient": lambda m, x, y: Objective(m, (x, y)).gradient(),
    "hessian": lambda m, x, y: (lambda H: H @ x.new_ones(H.shape[0]))(Objective(m, (x, y)).hessian()),
    "gauss-newton": lambda m, x, y: (lambda G: G @ x.new_ones(G.shape[0]))(Objective(m, (x, y)).gauss_newton()),
    "class gradients": lambda m, x, y: class_gradients(m, x, y, 3),
    "projected": lambda m, x, y: projected_gauss_newton(
        m, x, y, "cross_entropy", x.new_ones(sum(p.numel() for p in m.parameters()), 1)
    ),
    "scan": lambda m, x, y: LossScanner(Objective(m, (x, y))),
}


def _batch(recurrent: bool) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, *([2] if recurrent else []), 3, generator=g), torch.randint(0, 3, (6,), generator=g)


@pytest.mark.parametrize("work", WORK)
def test_curvature_has_all_digits_of_float32_though_tf32_is_on(gpu, work, torchs_own_precision):
    """torch has it on for convolutions unless told otherwise."""
    torch.set_float32_matmul_precision("high")
    model = on_gpu(Spy())
    WORK[work](model, *on_gpu(_batch(False)))
    assert {(matmul, conv) for _, matmul, conv, _ in SEEN} == {("ieee", "ieee")}
    assert all(enabled for enabled, *_ in SEEN)
    assert not any(flushing for *_, flushing in SEEN), "the host's threads were set, one after the other, for nothing"
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


STEPS: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "CurveBall": lambda m, x, y: CurveBall(m).step(x, y),
    "NegativeCurvature": lambda m, x, y: NegativeCurvature(m, lr=0.1).step(x, y),
}


@pytest.mark.parametrize("work", [*WORK, *STEPS])
def test_recurrent_layers_have_all_derivatives(gpu, work):
    """cuDNN's have no second ones, no forward-mode rule, and in evaluation mode not even first ones."""
    model = on_gpu(Spy(recurrent=True))
    {**WORK, **STEPS}[work](model, *on_gpu(_batch(True)))
    forward = [enabled for enabled, *_ in SEEN]
    assert not forward[0]
    assert torch.backends.cudnn.enabled
