"""How far each library's Hessian product is from plain double backward, in float64, layer by layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective

Row = dict[str, Any]


def _networks() -> dict[str, nn.Module]:
    def network(norm: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()

    return {
        "none": network(nn.Identity()),
        "LayerNorm": network(nn.LayerNorm((4, 4, 4))),
        "BatchNorm (batch statistics)": network(nn.BatchNorm2d(4, track_running_stats=False)),
        "GroupNorm": network(nn.GroupNorm(2, 4)),
    }


def _ours(model: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return Objective(model, [(x, y)]).hessian() @ v


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    return operator @ v


def _hessian_eigenthings(model: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(model, [(x, y)], supervised_loss(F.cross_entropy)).matvec(v)


TOOLS: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    "curvspace": _ours,
    "curvlinops": _curvlinops,
    "hessian_eigenthings": _hessian_eigenthings,
}


def errors() -> Iterator[Row]:
    """|Hv - reference| / |reference| of each library on a small network with each normalisation layer."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 2, 6, 6, dtype=torch.float64), torch.randint(3, (16,))
    for layer, model in _networks().items():
        model.train()
        parameters = list(model.parameters())
        v = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        reference = torch.cat([h.reshape(-1) for h in torch.autograd.grad(flat @ v, parameters)])
        for name, product in TOOLS.items():
            if name != "curvspace" and not importlib.util.find_spec(name):
                continue
            try:
                error, note = float((product(model, x, y, v) - reference).norm() / reference.norm()), ""
            except Exception as failure:  # whatever another library raises is the result
                error, note = float("nan"), f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
            yield {"layer": layer, "tool": name, "relative_error": error, "note": note}
