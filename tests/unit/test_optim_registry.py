"""Optimisers by name."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from curvspace.optim import FirstOrder, build, module_of
from curvspace.optim.registry import KINDS

OURS = ("sgd", "adam", "rmsprop", "class-gradient-newton", "rayleigh-ritz-newton", "low-rank-newton")
X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


@pytest.mark.parametrize("kind", [*OURS, "bulk-sgd", "dominant-sgd"])
def test_every_kind_builds_and_steps(kind: str) -> None:
    torch.manual_seed(0)
    optimizer = build(kind, {}, nn.Linear(3, 3), num_classes=3, lr=0.05, loss="cross_entropy")
    assert optimizer.param_groups[0]["lr"] == 0.05
    first = [float(optimizer.step(X, Y)) for _ in range(2)]
    assert first[0] == pytest.approx(float(nn.functional.cross_entropy(_fresh()(X), Y)), rel=1e-5)
    assert optimizer.steps == 2


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
        build("class-gradient-newton", {"gama": 0.9}, nn.Linear(3, 3), 3, 0.1)
    with pytest.raises(ValueError, match="momentun"):
        build("sgd", {"momentun": 0.9}, nn.Linear(3, 3), 3, 0.1)


@pytest.mark.parametrize(
    ("kind", "options", "new"),
    [
        ("class_gradient_newton", {}, "'class-gradient-newton'"),
        ("negative_curvature", {}, "'negative-curvature'"),
        ("class-gradient-newton", {"initial": "until seen"}, '"until-seen"'),
        ("class-gradient-newton", {"batch_norm": "auto"}, "batch_norm=None"),
        ("rayleigh-ritz-newton", {"batch_norm": "frozen"}, 'batch_norm="running"'),
        ("rayleigh-ritz-newton", {"batch_norm": "vjp"}, 'algorithm="vjp"'),
        ("bulk-sgd", {"span": "class-gradients", "method": "frozen"}, 'batch_norm="running"'),
        ("bulk-sgd", {"span": "class-gradients", "method": "auto"}, "batch_norm and algorithm"),
    ],
)
def test_old_names_are_refused_with_the_new_ones(kind: str, options: dict[str, object], new: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"is now {new}")):
        build(kind, options, nn.Linear(3, 3), 3, 0.1)


def test_own_optimizer_by_module_and_function() -> None:
    optimizer = build("curvspace.optim.first_order:adam", {"betas": (0.8, 0.9)}, nn.Linear(3, 3), 3, 0.1)
    assert isinstance(optimizer, FirstOrder)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_the_package_imports_no_optimiser_before_it_is_asked_for() -> None:
    code = "import sys, curvspace.optim; sys.exit('torch' in sys.modules or 'curvspace.optim.bases' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_jobs_step_without_torchs_compiler() -> None:
    code = (
        "import sys, torch; from curvspace.cli.common import spare_the_compiler; spare_the_compiler()\n"
        "from curvspace.optim import FirstOrder\n"
        "opt = FirstOrder(torch.nn.Linear(3, 3), torch.optim.{}, lr=0.1)\n"
        "opt.step(torch.ones(2, 3), torch.tensor([0, 1])); opt.load_state_dict(opt.state_dict())\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    for kind in ("SGD", "Adam", "RMSprop"):
        assert subprocess.run([sys.executable, "-c", code.format(kind)], check=False).returncode == 0


def test_an_optimiser_from_elsewhere_is_wrapped_as_it_is() -> None:
    class Halving(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)

    model = _fresh()
    optimizer = FirstOrder(model, Halving, defaults={})
    before = model.weight.detach().clone()
    optimizer.step(X, Y)
    assert type(optimizer.inner) is Halving
    assert torch.equal(model.weight, before / 2)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_wrapped_optimisers_do_what_torchs_do_with_their_hooks(kind: type[torch.optim.Optimizer]) -> None:
    ours, plain = _fresh(), _fresh()
    wrapped, reference = FirstOrder(ours, kind, lr=0.1), kind(plain.parameters(), lr=0.1)  # type: ignore[call-arg]
    calls = []
    wrapped.inner.register_step_post_hook(lambda *_: calls.append(1))
    for _ in range(3):
        wrapped.step(X, Y)
        reference.zero_grad()
        nn.functional.cross_entropy(plain(X), Y).backward()
        reference.step()
    assert torch.equal(ours.weight, plain.weight)
    assert torch.equal(ours.bias, plain.bias)
    assert len(calls) == 3


@pytest.mark.parametrize("value", [0.3, 2, "adam", None])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("class-gradient-newton", "sequential"),
        ("low-rank-newton", "cospace"),
        ("bsfa", "centred"),
        ("curveball", "adapt_damping"),
        ("curveball", "damping_in_model"),
    ],
)
def test_what_is_neither_true_nor_false_is_no_flag(kind: str, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
        build(kind, {"k": 2, name: value} if kind in ("low-rank-newton", "bsfa") else {name: value}, _fresh(), 3, 0.1)
