"""Optimisers by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from curvspace.optim import FirstOrder, build, module_of
from curvspace.optim.registry import KINDS

OURS = ("sgd", "adam", "rmsprop", "class_gradient_newton", "rayleigh_ritz_newton", "low_rank_newton")
X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


@pytest.mark.parametrize("kind", [*OURS, "bulk_sgd", "dominant_sgd"])
def test_every_kind_builds_and_steps(kind: str) -> None:
    torch.manual_seed(0)
    optimizer = build(kind, {}, nn.Linear(3, 3), num_classes=3, lr=0.05, loss="cross_entropy")
    assert optimizer.param_groups[0]["lr"] == 0.05
    first = [float(optimizer.step(X, Y)) for _ in range(2)]
    assert first[0] == pytest.approx(float(nn.functional.cross_entropy(_fresh()(X), Y)), rel=1e-5)
    assert optimizer.costs.steps == 2


def _fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_modules_of_kinds() -> None:
    assert module_of("curveball") == "curvspace.optim.curveball"
    assert module_of("my_package.rules:fast") == "my_package.rules"
    assert {module_of(kind) for kind in KINDS} >= {"curvspace.optim.first_order", "curvspace.optim.configurations"}


def test_unknown_kinds_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="unknown optimizer kind 'adamant'"):
        module_of("adamant")
    with pytest.raises(ValueError, match="no option 'gama'"):
        build("class_gradient_newton", {"gama": 0.9}, nn.Linear(3, 3), 3, 0.1)
    with pytest.raises(ValueError, match="momentun"):
        build("sgd", {"momentun": 0.9}, nn.Linear(3, 3), 3, 0.1)


def test_own_optimizer_by_module_and_function() -> None:
    optimizer = build("curvspace.optim.first_order:adam", {"betas": (0.8, 0.9)}, nn.Linear(3, 3), 3, 0.1)
    assert isinstance(optimizer, FirstOrder)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_the_package_imports_no_optimiser_before_it_is_asked_for() -> None:
    code = "import sys, curvspace.optim; sys.exit('torch' in sys.modules or 'curvspace.optim.bases' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
