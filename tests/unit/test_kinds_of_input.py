"""Kinds of inputs, targets and parameters: what a model or a loss may look at, and into what it may write."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import LossScanner, Objective, class_gradients
from curvspace.optim.registry import KINDS, build
from tests.unit.oracles import central_difference, flat_gradient, trainable
from tests.unit.small_networks import Fn

N = 20


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator).double(), torch.randint(3, (N,), generator=generator)


def _require_right(model: nn.Module, x: Any, alike: nn.Module, plain: Any, **options: Any) -> None:
    """Twice the loss, gradient and Hessian of the model at x are those of another one, alike, by central differences;
    x is as it was."""
    y = _data()[1]
    alike.load_state_dict(model.state_dict())
    before = copy.deepcopy(x)
    value = F.cross_entropy(alike(plain), y)
    gradient = flat_gradient(value, trainable(alike))
    v = torch.randn(len(gradient), generator=torch.Generator().manual_seed(2)).double()
    product = central_difference(alike, [(plain, y)], "cross_entropy", v)
    for microbatch in (None, 7):
        objective = Objective(model, [(x, y)], microbatch=microbatch, **options)
        hessian = objective.hessian()
        for _ in range(2):
            assert objective.loss() == pytest.approx(value.item())
            torch.testing.assert_close(objective.gradient(), gradient)
            torch.testing.assert_close(hessian @ v, product, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


class Sub(nn.Parameter):
    """A type of parameters of one's own."""


class Twice(Tensor):
    """Its matrix products count twice."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is torch.matmul else result


def _marked() -> nn.Parameter:
    p = nn.Parameter(torch.randn(3, 3).double())
    p.scale = 2.0  # type: ignore[attr-defined]
    return p


PARAMETERS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor, Any], Tensor], Callable[[Tensor, Any], Tensor]]] = {
    "isinstance of Parameter": (
        lambda: nn.Parameter(torch.randn(3, 3).double()),
        lambda z, p: torch.tanh(z @ p) if isinstance(p, nn.Parameter) else z,
        lambda z, p: torch.tanh(z @ p),
    ),
    "isinstance of a type derived from it": (
        lambda: Sub(torch.randn(3, 3).double()),
        lambda z, p: torch.tanh(z @ p) if type(p) is Sub else z,
        lambda z, p: torch.tanh(z @ p),
    ),
    "an attribute": (
        _marked,
        lambda z, p: torch.tanh(z @ p) * getattr(p, "scale", 1.0),
        lambda z, p: torch.tanh(z @ p) * 2.0,
    ),
    "a tensor of a type of its own": (
        lambda: nn.Parameter(torch.randn(3, 3).double().as_subclass(Twice)),
        lambda z, p: torch.tanh(torch.matmul(z, p)),
        lambda z, p: torch.tanh((z @ p.as_subclass(Tensor)) * 2),
    ),
    "no dimension": (lambda: nn.Parameter(torch.tensor(1.5).double()), lambda z, p: z * p * p, lambda z, p: z * p * p),
    "no entries": (lambda: nn.Parameter(torch.empty(0, 3).double()), lambda z, p: z + p.sum(), lambda z, p: z),
    "transposed": (
        lambda: nn.Parameter(torch.randn(3, 3).double().t()),
        lambda z, p: torch.tanh(z @ p),
        lambda z, p: torch.tanh(z @ p),
    ),
    "every other row": (
        lambda: nn.Parameter(torch.randn(6, 3).double()[::2]),
        lambda z, p: torch.tanh(z @ p),
        lambda z, p: torch.tanh(z @ p),
    ),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_kinds_of_parameters(kind: str) -> None:
    torch.manual_seed(0)
    make, f, plainly = PARAMETERS[kind]
    model = Fn(lambda m, x: f(m.net(x), m.p), net=_mlp(), p=make())
    alike = Fn(lambda m, x: plainly(m.net(x), m.p), net=_mlp(), p=make())
    x = _data()[0]
    _require_right(model, x, alike, x)
    scanners = [LossScanner(Objective(model, [(x, _data()[1])]), method) for method in ("loop", "vmap")]
    v = 0.1 * torch.ones(sum(p.numel() for p in model.parameters())).double()
    with torch.no_grad():
        for p in alike.parameters():
            p.add_(0.1)
    for scanner in scanners:
        assert scanner.along(v, [1.0])[0] == pytest.approx(F.cross_entropy(alike(x), _data()[1]).item())


def test_a_frozen_parameter_and_a_buffer_keep_their_types() -> None:
    torch.manual_seed(0)
    model = Fn(lambda m, x: m.net(x) * (m.p if isinstance(m.p, Sub) else 0), net=_mlp(), p=Sub(torch.rand(3).double()))
    model.p.requires_grad_(False)
    model.register_buffer("b", torch.rand(3, 3).double().as_subclass(Twice))
    f = model.f
    model.f = lambda m, x: torch.matmul(f(m, x), m.b)
    x, y = _data()
    assert Objective(model, (x, y)).loss() == pytest.approx(F.cross_entropy(model(x), y).item())


def test_an_expanded_parameter_counts_each_entry() -> None:
    torch.manual_seed(0)
    model = Fn(lambda m, x: m.net(x) @ m.p, net=_mlp(), p=nn.Parameter(torch.randn(3, 1).double().expand(3, 3)))
    x, y = _data()
    objective = Objective(model, (x, y))
    gradient = flat_gradient(F.cross_entropy(model(x), y), trainable(model))
    torch.testing.assert_close(objective.gradient(), gradient)
    v = torch.ones(len(gradient)).double()
    apart = copy.deepcopy(model)
    apart.p = nn.Parameter(model.p.detach().clone())
    torch.testing.assert_close(objective.hessian() @ v, central_difference(apart, [(x, y)], "cross_entropy", v))


def _doubled(m: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return m.net(x)


def _doubled_whole(m: Any, x: Tensor) -> Tensor:
    if len(x) == N:
        x.mul_(2)
        return m.net(x)
    return m.net(2 * x)


def _doubled_data(m: Any, x: Tensor) -> Tensor:
    x.data.mul_(2)
    return m.net(x)


def _doubled_numpy(m: Any, x: Tensor) -> Tensor:
    x.numpy()[:] *= 2
    return m.net(x)


def _doubled_entry(m: Any, d: Any) -> Tensor:
    d["x"] = 2 * d["x"]
    return m.net(d["x"])


def _popped(m: Any, d: Any) -> Tensor:
    return m.net(2 * d.pop("x"))


def _popped_list(m: Any, entries: list[Tensor]) -> Tensor:
    return m.net(2 * entries.pop())


WRITERS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Any]]] = {
    "in place": (_doubled, lambda x: x),
    "in place, of some sizes": (_doubled_whole, lambda x: x),
    "through .data": (_doubled_data, lambda x: x),
    "through NumPy": (_doubled_numpy, lambda x: x),
    "a mapping's entry": (_doubled_entry, lambda x: ({"x": x},)),
    "an entry of a mapping of one's own": (_doubled_entry, lambda x: (UserDict({"x": x}),)),
    "popped from a mapping": (_popped, lambda x: ({"x": x},)),
    "popped from a list": (_popped_list, lambda x: ([x],)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_model_that_writes_into_its_inputs(kind: str) -> None:
    torch.manual_seed(0)
    f, form = WRITERS[kind]
    x = _data()[0]
    _require_right(Fn(f, net=_mlp()), form(x.clone()), Fn(lambda m, x: m.net(2 * x), net=_mlp()), x)


def test_a_nested_mapping_keeps_its_type() -> None:
    torch.manual_seed(0)
    (x, y), model = _data(), Fn(lambda m, d: m.net(d.data["x"]), net=_mlp())
    assert Objective(model, [((UserDict({"x": x}),), y)]).loss() == pytest.approx(
        F.cross_entropy(model.net(x), y).item()
    )


def _scaling(z: Tensor, y: Tensor) -> Tensor:
    y.mul_(2)
    return (z - y).square().sum(1).mean()


def _popping(z: Tensor, y: dict[str, Tensor]) -> Tensor:
    return (z - 2 * y.pop("y")).square().sum(1).mean()


def _scaling_data(z: Tensor, y: Tensor) -> Tensor:
    y.data.mul_(2)
    return (z - y).square().sum(1).mean()


@pytest.mark.parametrize("loss", [_scaling, _popping, _scaling_data])
def test_a_loss_that_writes_into_its_targets(loss: Any) -> None:
    torch.manual_seed(0)
    (x, _), y, model = _data(), torch.randn(N, 3).double(), _mlp()
    targets: Any = {"y": y.clone()} if loss is _popping else y.clone()
    value = (model(x) - 2 * y).square().sum(1).mean()
    gradient = flat_gradient(value, trainable(model))
    for microbatch in (None, 7):
        objective = Objective(model, [(x, targets)], loss, microbatch=microbatch)
        fisher = Objective(model, [(x, 2 * y)], lambda z, y: (z - y).square().sum(1).mean()).empirical_fisher()
        for _ in range(2):
            assert objective.loss() == pytest.approx(value.item())
            torch.testing.assert_close(objective.gradient(), gradient)
            torch.testing.assert_close(objective.empirical_fisher() @ gradient, fisher @ gradient)
    assert torch.equal(y, targets["y"] if loss is _popping else targets)


def _optimisers() -> list[str]:
    return [k for k in KINDS if k not in ("muon", "span-filter")] + ["torch.optim:LBFGS", "curvspace.optim.kfac:KFAC"]


class Deep(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.in_place = nn.Linear(4, 5), nn.Linear(5, 3), in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x.mul_(2)
        else:
            x = 2 * x
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("kind", _optimisers())
def test_optimisers_of_a_model_that_writes_into_its_inputs(kind: str) -> None:
    if kind.endswith("KFAC"):
        pytest.importorskip("curvlinops")
    ends = []
    for in_place in (True, False):
        model = Deep(in_place)
        optimizer = build(kind, {}, model, 3, 0.05, "cross_entropy", seed=0)
        (x, y) = _data()
        x = x.float()
        before = x.clone()
        for _ in range(3):
            optimizer.step(x, y)
        assert torch.equal(x, before)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.complex64, torch.complex128])
def test_complex_inputs_are_cast_as_real_ones_are(dtype: torch.dtype, given: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 4, dtype=torch.float64), _data()[1]
    single = dtype is not torch.float64
    model = Fn(lambda m, x: m.net(x.real.to(m.net[0].weight.dtype)), net=_mlp().to(dtype))
    real = Fn(lambda m, x: m.net(x.real), net=_mlp().to(torch.float32 if single else torch.float64))
    value = F.cross_entropy(model.net(x.to(given).real.to(dtype)), y).item()
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-6
    assert Objective(model, (x.to(given), y)).loss() == pytest.approx(value, rel=tolerance)
    value = F.cross_entropy(real.net(x.to(given).real.to(real.net[0].weight.dtype)), y).item()
    assert Objective(real, (x.to(given), y)).loss() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_sixteen_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (x, y), model = _data(), _mlp().to(dtype)
    exact = copy.deepcopy(model).double()
    there, here = Objective(exact, (x.to(dtype).double(), y)), Objective(model, (x, y))
    v = torch.randn(here.num_parameters)
    pairs = [
        (here.gradient(), there.gradient()),
        (here.hessian() @ v, there.hessian() @ v.to(dtype)),
        (here.gauss_newton() @ v, there.gauss_newton() @ v.to(dtype)),
        (class_gradients(model, x, y, 3)[0], class_gradients(exact, x.to(dtype).double(), y, 3)[0]),
    ]
    for found, right in pairs:
        assert (found.double() - right).norm() < 8 * torch.finfo(dtype).eps * right.norm()
