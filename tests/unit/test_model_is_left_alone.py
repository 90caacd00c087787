"""Nothing of the user's model or batches changes, whatever is computed; what cannot be replaced is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from curvspace import Objective, class_gradients, optim
from curvspace.curvature import (
    cross_class_gradients,
)
from curvspace.inputs import tensors_in
from curvspace.landscape import LossScanner
from tests.unit.architectures import CASES
from tests.unit.small_networks import Fn, minibatch, mlp


class Siamese(nn.Module):
    """One module under two names, with buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.branches = nn.ModuleDict({"a": self.enc})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.branches["a"](x)))


class Keeps(nn.Module):
    """Counts its calls, keeps activations, writes a buffer anew, a plain tensor in place, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(5, 3)
        self.calls, self.seen, self.last = 0, torch.zeros(()), None
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("counted", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.counted += 1
        self.last = z = self.h(x)
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        torch.rand(2)
        return z


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.h = nn.LSTM(5, 4, 2, dropout=0.3, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.r(x[:, None])[0][:, -1])


def _reals(n: int) -> Tensor:
    return torch.randn(n, 5, dtype=torch.float64)


MORE: dict[str, Callable[[], nn.Module]] = {
    "one module, two names": Siamese,
    "keeps things": Keeps,
    "LSTM": Recurrent,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "older weight_norm": lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3)),
    "checkpoint": lambda: Fn(
        lambda s, x: s.b(checkpoint(lambda x: torch.tanh(s.a(x)), x, use_reentrant=False)),
        a=nn.Linear(5, 4),
        b=nn.Linear(4, 3),
    ),
    "writes into its inputs": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Linear(4, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
}
ALL = {name: (case.make, case.loss) for name, case in CASES.items()}
ALL |= {
    name: (
        lambda build=build: (build().double(), [(_reals(n), torch.randint(3, (n,))) for n in (5, 12)]),
        "cross_entropy",
    )
    for name, build in MORE.items()
}


def _attributes(model: nn.Module, batches: list[Any]) -> Iterator[tuple[str, Any]]:
    """Everything that a module and the batches hold, objects by identity, tensors by value too."""
    for name, module in model.named_modules(remove_duplicate=False):
        entries = {**module.__dict__, **module._parameters, **module._buffers, **module._modules}
        for key, value in entries.items():
            place = f"{name}.{key}"
            yield place, (id(value), type(value))
            yield f"{place} content", copy.copy(value) if isinstance(value, dict | list) else None
            for i, t in enumerate(tensors_in(value) if not isinstance(value, dict) else []):
                kept = (t.dtype, t.requires_grad, t.is_leaf, id(t.grad), t.grad_fn is None, t._version)
                yield f"{place} tensor {i}", (*kept, t.detach().clone())
    for i, batch in enumerate(batches):
        for j, t in enumerate(tensors_in(batch)):
            yield f"batch {i} tensor {j}", (t.dtype, t._version, t.clone())
    yield "generator", (torch.get_rng_state(),)
    yield "default type", torch.get_default_dtype()
    yield "grad mode", torch.is_grad_enabled()
    yield "fast path", torch.backends.mha.get_fastpath_enabled()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and any(isinstance(v, Tensor) for v in a):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict | list):
        left, right = (list(v.items()) if isinstance(v, dict) else v for v in (a, b))
        return len(left) == len(right) and all(
            x is y or x == y for x, y in zip(map(_ids, left), map(_ids, right), strict=True)
        )
    return a == b


def _ids(value: Any) -> Any:
    return (value[0], id(value[1])) if isinstance(value, tuple) and len(value) == 2 else id(value)


def _everything(model: nn.Module, batches: list[Any], loss: str) -> None:
    for options in (
        {},
        {"batch_norm": "batch"},
        {"batch_norm": "running", "dropout_seed": 3},
        {"dtype": torch.float32},
    ):
        objective = Objective(model, batches, loss, **options)
        v = torch.ones(objective.num_parameters)
        objective.loss(), objective.gradient(), objective.hessian() @ v, objective.gauss_newton() @ v
    x, y = batches[-1]
    if loss == "cross_entropy" and y.ndim == 1:
        classes = 5 if int(y.max()) > 2 else 3
        for algorithm in ("auto", "vjp"):
            class_gradients(model, x, y, classes, algorithm=algorithm)
        cross_class_gradients(model, x, y, classes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "loss"), ALL.values(), ids=ALL.keys())
def test_no_attribute_changes(make, loss, training):
    torch.manual_seed(0)
    model, batches = make()
    model.train(training)
    for p in list(model.parameters())[:1]:
        p.grad = torch.ones_like(p)
    before = list(_attributes(model, batches))
    _everything(model, batches, loss)
    after = dict(_attributes(model, batches))
    changed = [place for place, value in before if not _same(value, after[place])]
    assert changed == []
    assert len(before) == len(after)


def test_training_goes_on_after_a_look():
    def train(look: bool) -> float:
        torch.manual_seed(0)
        model, x, y = Siamese(), torch.randn(20, 5), torch.randint(3, (20,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(6):
            if look:
                Objective(model, (x, y), dtype=torch.float64).hessian() @ torch.ones(47)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert train(True) == train(False)


@pytest.mark.parametrize("engine", ["auto", "linearize", "recompute"])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_changes_in_place(engine, kind):
    (x, y), v = minibatch(), torch.ones(43).double()
    doubled = Fn(lambda s, x: s.b(s.a(x).sigmoid().mul_(2)), a=nn.Linear(4, 5), b=nn.Linear(5, 3))  # needs its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        getattr(Objective(doubled.double(), (x, y), engine=engine), kind)() @ v
    for change in (lambda: x.mul_(2), lambda: y.zero_()):
        operator = getattr(Objective(mlp(), (x, y), engine=engine), kind)()
        operator @ v
        change()
        with pytest.raises(RuntimeError, match="batch 0 has been modified by an inplace operation"):
            operator @ v


class Notes(nn.Module):
    """Keeps state in containers and arrays, and layers where PyTorch does not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.stats: dict[str, Any] = {"calls": 0, "mean": torch.zeros(5).double(), "deep": [[0]]}
        self.log: list[Any] = []
        self.seen, self.pair, self.array = {0}, (torch.zeros(()), [0]), np.zeros(2)
        self.same = self.stats
        self.layers = {"norm": [nn.BatchNorm1d(5).double(), nn.Dropout(0.5)]}

    def forward(self, x: Tensor) -> Tensor:
        self.stats["calls"] += 1
        self.same["calls"] += 1
        self.stats["mean"] += 1
        self.stats["deep"][0].append(1)
        self.log.append(x)
        self.seen.add(len(self.log))
        self.pair[0].add_(1)
        self.pair[1].append(1)
        self.array += 1
        norm, dropout = self.layers["norm"]
        return self.b(torch.tanh(dropout(norm(self.a(x)))))


def test_containers_and_the_modules_in_them():
    torch.manual_seed(0)
    model, (x, y) = Notes().double(), minibatch()
    norm, dropout = model.layers["norm"]
    norm.running_mean.uniform_(-1, 1)
    kept = norm.running_mean.clone()
    plain = nn.Sequential(model.a, copy.deepcopy(norm).requires_grad_(False), nn.Tanh(), model.b)
    v = torch.randn(43).double()
    for options in ({}, {"batch_norm": "batch"}, {"batch_norm": "running"}):
        ours, expected = (Objective(m, (x, y), **options) for m in (model, plain))
        assert ours.policy == expected.policy
        torch.testing.assert_close(ours.hessian() @ v, expected.hessian() @ v)
        torch.testing.assert_close(ours.gauss_newton() @ v, expected.gauss_newton() @ v)
        class_gradients(model, x, y, 3)
    assert model.stats["calls"] == 0
    assert model.stats["deep"] == [[0]]
    assert not model.stats["mean"].any()
    assert model.stats is model.same
    assert (model.log, model.seen, model.pair[1]) == ([], {0}, [0])
    assert not model.pair[0].any()
    assert not model.array.any()
    assert torch.equal(norm.running_mean, kept)
    assert norm.num_batches_tracked == 0
    assert norm.training
    assert dropout.training


class Large(nn.Module):
    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        if buffer:
            self.register_buffer("table", torch.zeros(2**18 + 1))
        else:
            self.table = torch.zeros(2**18 + 1)

    def forward(self, x: Tensor) -> Tensor:
        self.table[0] += 1
        return self.a(x)


def test_a_large_plain_tensor_that_forward_writes():
    x, y = minibatch()
    with pytest.warns(
        RuntimeWarning, match=r"changed Large.table, a plain tensor of 1.0 MiB .* register it as a buffer"
    ):
        Objective(Large(False).double(), (x, y)).loss()
    model = Large(True).double()
    Objective(model, (x, y)).loss()
    assert not model.table.any()


class Centred(nn.Module):
    """A loss with a centre that each call moves, a normalisation and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls, self.seen = nn.BatchNorm1d(3, affine=False), 0, []
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(z))
        loss = F.cross_entropy(self.norm(z) - 0.1 * self.centre, y)
        self.centre.mul_(0.9).add_(0.1 * z.detach().mean(0))
        return loss

    def held(self) -> tuple[Any, ...]:
        return self.calls, list(self.seen), *(b.clone() for b in self.buffers())


class Holder:
    def __init__(self, loss: nn.Module):
        self.loss = loss

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return self.loss(z, y)


GLOBAL = Centred().double()


HELD: dict[str, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "itself": lambda loss: loss,
    "closure": lambda loss: lambda z, y: loss(z, y),
    "global": lambda _: lambda z, y: GLOBAL(z, y),
    "bound method": lambda loss: loss.forward,
    "partial": lambda loss: partial(lambda z, y, by: by(z, y), by=loss),
    "object": Holder,
}


@pytest.mark.parametrize("way", HELD)
def test_a_loss_that_has_a_state_of_its_own_is_left_alone(way):
    torch.manual_seed(0)
    model, (x, y), loss = mlp(), minibatch(), GLOBAL if way == "global" else Centred().double()
    objective, before = Objective(model, (x, y), HELD[way](loss)), loss.held()
    v = torch.randn(43).double()
    values = objective.loss(), *LossScanner(objective).along(v, [0.0])
    assert values == pytest.approx([copy.deepcopy(loss)(model(x), y).item()] * 2)
    expected = objective.hessian_by_differences() @ v
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)
    objective.gauss_newton() @ v
    for a, b in zip(loss.held(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    optim.FirstOrder(model, torch.optim.SGD, HELD[way](loss), lr=0.1).step(x, y)  # training does move it
    assert loss.held()[0] == 1 + before[0]
