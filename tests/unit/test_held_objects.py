"""Whatever a model or a loss holds, looking for what it keeps neither fails, nor changes it, nor takes long."""

from __future__ import annotations

import collections
import io
import socket
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective

N = 300  # above the size from which a CPU cuts


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Slots:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = 1


class Raising:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("==")

    def __hash__(self) -> int:
        raise RuntimeError("hash")

    @property
    def value(self) -> Any:
        raise RuntimeError("value")


class WithoutAttributes:
    @property
    def __dict__(self) -> Any:
        raise RuntimeError("__dict__")


class RaisingList(list[Any]):
    def __iter__(self) -> Any:
        raise RuntimeError("iter")


class RaisingDict(dict[Any, Any]):
    def items(self) -> Any:
        raise RuntimeError("items")


class Endless(Mapping[Any, Any]):
    def __getitem__(self, key: Any) -> Any:
        return key

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0

    def __len__(self) -> int:
        return 10**9


class Proxy:
    def __init__(self, held: Any) -> None:
        object.__setattr__(self, "_held", held)

    def __getattribute__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_held"), name)


def _cycle() -> Any:
    entries: list[Any] = [1]
    entries += [entries, {"entries": entries}]
    return entries


def _deep() -> Any:
    held: Any = []
    for _ in range(3000):
        held = [held]
    return held


def _chain() -> Any:
    held: Any = None
    for _ in range(3000):
        held = types.SimpleNamespace(held=held)
    return held


def _group() -> Any:
    store = torch.distributed.HashStore()
    return torch.distributed.ProcessGroupGloo(store, 0, 1)


THINGS: dict[str, Callable[[], Any]] = {
    "slots": Slots,
    "what raises": Raising,
    "no attributes": WithoutAttributes,
    "a list that raises": lambda: RaisingList([1]),
    "a dictionary that raises": lambda: RaisingDict(a=1),
    "endless": Endless,
    "proxy": lambda: Proxy(3),
    "lock": threading.Lock,
    "condition": threading.Condition,
    "thread": lambda: threading.Thread(target=print),
    "file": lambda: open(__file__),  # noqa: SIM115
    "bytes": lambda: io.BytesIO(b"x"),
    "socket": socket.socket,
    "process group": _group,
    "generator": lambda: (i for i in range(3)),
    "iterator": lambda: iter([1, 2]),
    "weak reference": lambda: weakref.ref(Slots),
    "a cycle": _cycle,
    "lists in lists": _deep,
    "objects in objects": _chain,
    "a long list": lambda: list(range(10**6)),
    "a large dictionary": lambda: dict.fromkeys(range(10**6)),
    "a large set": lambda: set(range(10**6)),
    "many lists": lambda: {i: {j: [0] * 10 for j in range(100)} for i in range(300)},
    "many tensors": lambda: [torch.zeros(10) for _ in range(30_000)],
    "large tensors": lambda: [torch.zeros(200_000) for _ in range(300)],
    "a large array": lambda: np.zeros((3000, 1000)),
    "objects in an array": lambda: np.array([object(), None], dtype=object),
    "a dictionary with defaults": lambda: collections.defaultdict(lambda: 1 / 0),
}


class OwnLoss(nn.Module):
    thing: Any = None

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y)


class Caller:
    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y)


def _module(thing: Any) -> Any:
    loss = OwnLoss()
    loss.thing = thing
    return loss


def _around(thing: Any) -> Any:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        assert thing is not None
        return F.cross_entropy(z, y)

    return loss


GLOBAL: Any = None


def _global(thing: Any) -> Any:
    global GLOBAL
    GLOBAL = thing

    def loss(z: Tensor, y: Tensor) -> Tensor:
        assert GLOBAL is not None
        return F.cross_entropy(z, y)

    return loss


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "model": lambda thing: "cross_entropy",
    "module": _module,
    "object": Caller,
    "closure": _around,
    "global": _global,
}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator).double(), torch.randint(3, (N,), generator=generator)


@pytest.mark.filterwarnings("error:an evaluation has changed")
@pytest.mark.parametrize("name", THINGS)
def test_what_is_held(name: str) -> None:
    plain = Objective(Network(), _batch())
    v = torch.ones(plain.num_parameters).double()
    product = plain.hessian() @ v
    for where, holder in HOLDERS.items():
        thing, model = THINGS[name](), Network()
        if where == "model":
            model.thing = thing
        loss = holder(thing)
        size = len(thing) if isinstance(thing, list | dict | set) else None
        start = time.perf_counter()
        objective = Objective(model, _batch(), loss)
        assert objective.loss() == pytest.approx(plain.loss())
        torch.testing.assert_close(objective.hessian() @ v, product)
        assert time.perf_counter() - start < 10
        holding = {"model": model, "module": loss, "object": loss}
        assert where not in holding or holding[where].thing is thing
        assert size is None or len(thing) == size
        if name == "generator":
            assert next(thing) == 0
        if name == "lock":
            assert not thing.locked()


def test_a_list_too_long_to_be_copied_that_changes_is_told() -> None:
    model, log = Network(), list(range(10**6))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        log.append(0)
        return F.cross_entropy(z, y)

    with pytest.warns(RuntimeWarning, match="an evaluation has changed what the loss keeps, a list of 1000000 entries"):
        Objective(model, _batch(), loss).loss()


def test_variables_around_two_functions_are_told_apart_by_what_they_are() -> None:
    first, second, seen = torch.ones(3).double(), torch.zeros(3).double(), []

    def inner(z: Tensor) -> Tensor:
        seen.append(1)
        return z + first + second

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(inner(z) * (1 + first) - second, y)

    model, (x, y) = Network(), _batch()
    assert Objective(model, (x, y), loss).loss() == pytest.approx(F.cross_entropy((model(x) + 1) * 2, y).item())
    assert not seen
