"""Copies of objectives and operators go on by themselves; those that could not are refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective
from curvspace.optim import FirstOrder, class_gradient_newton

WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: _saved(value),
}
MATRICES: dict[str, Callable[[Objective], Any]] = {
    "Hessian": lambda o: o.hessian(),
    "Gauss-Newton": lambda o: o.gauss_newton(),
    "Fisher": lambda o: o.empirical_fisher(),
    "differences": lambda o: o.hessian_by_differences(),
    "part": lambda o: o.part("2.*").hessian(),
}


def _saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 4, generator=generator).double(), torch.randint(3, (20,), generator=generator)


def spread_out(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.1 * z.square().mean()


@torch.no_grad()
def _grow(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(1.5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("engine", ["linearize", "recompute"])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_an_operator_goes_its_own_way(way: str, matrix: str, engine: Any, used: bool) -> None:
    model, make = _network(), MATRICES[matrix]
    batch = _batch()
    batch[0].mul_(1.0)  # changed before, which a copy does not know
    operator = make(Objective(model, batch, spread_out, engine=engine))
    v = torch.randn(operator.shape[0]).double()
    old = make(Objective(copy.deepcopy(model), batch, spread_out)) @ v
    if used:
        operator @ v
    copied = WAYS[way](operator)
    products = operator.products
    torch.testing.assert_close(copied @ v, old)
    _grow(model)
    new = make(Objective(copy.deepcopy(model), batch, spread_out)) @ v
    operator.refresh()
    for _ in range(2):
        torch.testing.assert_close(operator @ v, new)
        torch.testing.assert_close(copied @ v, old)
    assert operator.products == products + 2
    if matrix == "differences":
        assert len(operator.errors) == 2 + used
    copied.refresh()
    torch.testing.assert_close(copied @ v, new if way == "copy" else old)
    torch.testing.assert_close(operator @ v, new)


def test_a_refresh_of_a_copy_changes_nothing_of_the_original() -> None:
    model, batch = _network(), _batch()
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    operator = Objective(model, [batch, (batch[0][:5], batch[1][:5])], nn.CrossEntropyLoss(weight)).hessian()
    v = torch.ones(operator.shape[0]).double()
    before, copied = operator @ v, copy.copy(operator)
    weight[0] = 9.0
    kept = operator.point.loss
    copied.refresh()
    assert operator.point.loss is kept
    assert not torch.allclose(copied @ v, before)


def test_a_copy_of_an_operator_whose_batch_has_changed_is_refused() -> None:
    x, y = _batch()
    operator = Objective(_network(), (x, y)).hessian()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        copy.deepcopy(operator)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", ["cross_entropy", spread_out])
def test_a_copy_of_an_objective_has_a_copy_of_the_model(way: str, loss: Any) -> None:
    model = _network()
    objective = Objective(model, _batch(), loss)
    old, copied = objective.loss(), WAYS[way](objective)
    _grow(model)
    assert copied.loss() == (objective.loss() if way == "copy" else old)
    assert (copied.model is model) == (way == "copy")
    assert copied.function.model is copied.model


class Penalised:
    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + sum(p.square().sum() for p in self.model.parameters())


def _penalised(model: nn.Module, held: bool) -> Callable[[Tensor, Tensor], Tensor]:
    parameters = list(model.parameters())
    return lambda z, y: (
        F.cross_entropy(z, y) + sum(p.square().sum() for p in (parameters if held else model.parameters()))
    )


def test_a_loss_that_reads_the_model_follows_its_copy_or_the_copy_is_refused() -> None:
    model, (x, y) = _network(), _batch()
    copied = copy.deepcopy(Objective(model, (x, y), Penalised(model)))
    right = Objective(copied.model, (x, y), _penalised(copied.model, False)).gradient()
    _grow(model)
    torch.testing.assert_close(copied.gradient(), right)
    for held in (False, True):
        loss = _penalised(model, held)
        objective = Objective(model, (x, y), loss)
        optimizers = FirstOrder(model, torch.optim.SGD, loss, lr=0.1), class_gradient_newton(model, 3, loss=loss)
        for made in (objective, *optimizers):
            with pytest.raises(TypeError, match="cannot be copied: its loss reads the model by a variable"):
                copy.deepcopy(made)
    assert copy.copy(objective).num_parameters == objective.num_parameters
    assert Objective(model, (x, y), _penalised(model, False)).part("0.*").gradient().shape == (25,)
