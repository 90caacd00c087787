"""Memory: how much of each batch is kept between products, and what is tried when it is not enough."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch import nn

from curvspace import Objective
from curvspace.curvature.split import within_memory
from curvspace.losses import CrossEntropy
from tests.unit.architectures import CASES
from tests.unit.small_networks import minibatch, mlp


def test_the_memory_budget_decides_how_much_is_kept():
    model, (x, y) = mlp(), minibatch(40)
    batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    first = Objective(model, batches).hessian()
    first @ v
    each = 10 * first._bytes_per_example
    kept = []
    for budget in (0, 2.5 * each, 10**9):
        H = Objective(model, batches, memory_budget=budget).hessian()
        product = H @ v
        torch.testing.assert_close(product, Objective(model, [(x, y)]).hessian() @ v, rtol=0, atol=1e-13)
        kept.append(len(H._kept))
    assert kept == [0, 2, 4]


class Greedy(nn.Module):
    """A model that runs out of memory with more than five examples at a time."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if len(x) > 5:
            raise torch.OutOfMemoryError("out of memory, as devices say it")
        return self.inner(x)


@pytest.mark.parametrize("quantity", ["loss", "gradient"])
def test_out_of_memory_in_the_loss_and_the_gradient(quantity):
    inner, batch = mlp(), minibatch(12)
    objective = Objective(Greedy(inner), [batch])
    with pytest.warns(RuntimeWarning, match="out of memory with 12 examples"):
        found = getattr(objective, quantity)()
    expected = getattr(Objective(inner, [batch]), quantity)()
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-14)
    with pytest.raises(torch.OutOfMemoryError):  # masks would change with the batches
        Objective(Greedy(inner), [batch], dropout_seed=0).loss()


def test_out_of_memory_shrinks_the_batches_and_says_so():
    inner, batch = mlp(), minibatch(12)
    H = Objective(Greedy(inner), [batch]).hessian()
    v = torch.ones(H.shape[0]).double()
    with pytest.warns(RuntimeWarning, match="out of memory with 12 examples at a time .* going on with 6") as said:
        product = H @ v
    assert len(said) == 1
    assert {b.size for b in H.batches} == {3}
    torch.testing.assert_close(product, Objective(inner, [batch]).hessian() @ v, rtol=0, atol=1e-14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(H @ v, product)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=str,
)
def test_memory_that_ends_in_the_loss_is_known_in_all_of_its_words(error):
    class GreedyLoss(CrossEntropy):
        def __call__(self, outputs, targets):
            if len(outputs) > 5:
                raise error
            return super().__call__(outputs, targets)

    inner, batch = mlp(), minibatch(12)
    with pytest.warns(RuntimeWarning, match="out of memory with 12 examples"):
        found = Objective(inner, [batch], GreedyLoss()).gradient()
    torch.testing.assert_close(found, Objective(inner, [batch]).gradient(), rtol=0, atol=1e-14)


def test_what_did_not_fit_is_let_go_before_less_is_tried():
    class Graph:
        pass

    held: list[weakref.ref] = []
    objective = Objective(mlp(), [minibatch(12)])

    def compute(batches):
        if len(batches) == 1:
            graph = Graph()
            held.append(weakref.ref(graph))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(batches)

    def point():
        assert held[0]() is None, "the traceback still holds it"
        return objective._point()

    with pytest.warns(RuntimeWarning, match="going on with 6"):
        assert within_memory(compute, objective.batches, point)[0] == 2
    assert held


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_as_many_vectors_are_multiplied_together_as_fit(kind, monkeypatch):
    """Before the batch is cut, which it cannot always be: here its statistics would change."""
    model, batches = CASES["batchnorm-batch"].make()
    operator = getattr(Objective(model, batches, batch_norm="batch"), kind)()
    V = torch.randn(operator.shape[0], 11, dtype=torch.float64)
    expected = operator @ V
    tried = []

    class Narrow(type(operator).linearisation):
        def products(self, vs):
            tried.append(len(vs[0]))
            if len(vs[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().products(vs)

    operator = getattr(Objective(model, batches, batch_norm="batch"), kind)()
    operator.linearisation, operator.vectors_at_once = Narrow, 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(operator @ V, expected, rtol=0, atol=1e-13)
    assert tried[:4] == [8, 4, 2, 2]
    assert operator.engine != "recompute"
