"""Layers that are added, replaced, frozen or let loose after an objective or operator was made: right, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from curvspace import LossScanner, Objective


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.mid: nn.Module | None = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h if self.mid is None else self.mid(h))


class Adapted(nn.Module):
    """A frozen linear layer and a product of two thin ones beside it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, layer.out_features, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def _set(**layers: Any) -> Callable[[Network], None]:
    def change(model: Network) -> None:
        for name, make in layers.items():
            setattr(model, name, make(getattr(model, name)))

    return change


def _frozen(model: Network) -> None:
    model.a.requires_grad_(False)


GONE = "'a.weight', 'a.bias' is frozen or gone"
CHANGES: dict[str, tuple[Callable[[Network], Any], str | None, bool]] = {
    # what changes, of what the objective complains, whether a recomputed operator may go on
    "a layer more": (_set(mid=lambda _: nn.Linear(5, 5).double()), "'mid.weight', 'mid.bias' is new", False),
    "a frozen layer more": (_set(mid=lambda _: nn.Linear(5, 5).double().requires_grad_(False)), None, False),
    "dropout": (_set(mid=lambda _: nn.Dropout(0.5)), None, False),
    "statistics": (_set(mid=lambda _: nn.BatchNorm1d(5, affine=False).double()), None, False),
    "an adapter": (_set(a=Adapted), GONE, False),
    "frozen": (_frozen, GONE, True),
    "another layer": (_set(b=lambda _: nn.Linear(5, 3).double()), None, False),
    "another parameter": (lambda m: setattr(m.b, "bias", nn.Parameter(torch.randn(3).double())), None, True),
    "a parametrisation": (lambda m: parametrizations.weight_norm(m.a), "'a.weight' is frozen or gone", False),
}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 4, generator=generator).double(), torch.randint(3, (20,), generator=generator)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("batch_norm", ["running", "batch"])
def test_layers_that_change_later(name: str, batch_norm: Any) -> None:
    change, complaint, goes_on = CHANGES[name]
    model, batch = Network(), _batch()
    objective = Objective(model, batch, batch_norm=batch_norm)
    kept, again = (
        Objective(model, batch, engine=engine, batch_norm=batch_norm).hessian() for engine in ("linearize", "recompute")
    )
    scanner = LossScanner(objective)
    v = torch.randn(kept.shape[0]).double()
    old = kept @ v
    change(model)
    torch.testing.assert_close(kept @ v, old)  # a copy at the time of the call
    if goes_on:
        torch.testing.assert_close(again @ v, old)
        scanner.along(v, [0.1])
    else:
        for use in (lambda: again @ v, lambda: scanner.along(v, [0.1])):
            with pytest.raises(RuntimeError, match="the modules of Network have changed since this operator was made"):
                use()
    if complaint is None:
        fresh = Objective(model, batch, batch_norm=batch_norm)
        assert objective.loss() == fresh.loss()
        torch.testing.assert_close(objective.gradient(), fresh.gradient())
        new = fresh.hessian() @ v
        kept.refresh()
        torch.testing.assert_close(kept @ v, new)
        torch.testing.assert_close(objective.hessian() @ v, new)
        return
    for use in (objective.loss, objective.gradient, objective.hessian, kept.refresh):
        with pytest.raises(RuntimeError, match=f"the trainable parameters of Network have changed: {complaint}"):
            use()


def test_a_layer_let_loose() -> None:
    model, batch = Network(), _batch()
    model.a.requires_grad_(False)
    objective, part = Objective(model, batch), Objective(model, batch, parameters="b.*")
    gradient = objective.gradient()
    model.a.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'a.weight', 'a.bias' is new since"):
        objective.gradient()
    torch.testing.assert_close(part.gradient(), gradient)  # whose parameters are named


def test_layers_of_another_size() -> None:
    model, batch = Network(), _batch()
    objective = Objective(model, batch)
    operator = objective.hessian()
    model.a, model.b = nn.Linear(4, 7).double(), nn.Linear(7, 3).double()
    with pytest.raises(RuntimeError, match="other than 43 parameters now: make a new Hessian"):
        operator.refresh()
    torch.testing.assert_close(objective.gradient(), Objective(model, batch).gradient())


def test_pruning_changes_the_parameters() -> None:
    model, batch = Network(), _batch()
    objective = Objective(model, batch)
    prune.random_unstructured(model.a, "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"'a.weight' is frozen or gone"):
        objective.loss()


def test_modes_are_those_of_the_time_of_the_construction() -> None:
    model, batch = Network(), _batch()
    model.mid = nn.BatchNorm1d(5).double()
    objective = Objective(model, batch)
    before = objective.loss()
    model.eval()
    assert objective.loss() == before
