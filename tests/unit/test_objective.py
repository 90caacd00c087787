"""What an Objective promises beside exact products: policy, memory, bad input, and traps of the framework."""

from __future__ import annotations

import random
import warnings
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.curvature import dense_matrix, eigsh, gram_eigh, projected_gauss_newton
from curvspace.curvature.split import within_memory
from curvspace.functional import assign_parameters, parameter_vector
from curvspace.losses import CrossEntropy
from curvspace.monitor import CurvatureMonitor
from tests.unit.architectures import CASES
from tests.unit.oracles import central_difference, dense_hessian


def _mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def _batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 4).double(), torch.randint(3, (n,))


def _norm_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[1].running_mean.uniform_(-1, 1)
    return model


# Policy


def test_running_statistics_and_modes_are_left_alone():
    model = _norm_network().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for batch_norm in ("batch", "running", None):
        objective = Objective(model, [_batch()], batch_norm=batch_norm)
        v = torch.ones(objective.num_parameters).double()
        objective.loss(), objective.gradient(), objective.hessian() @ v, objective.gauss_newton() @ v
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_batch_norm_chooses_the_statistics():
    model, batch = _norm_network(), _batch()
    loss = {batch_norm: Objective(model, [batch], batch_norm=batch_norm).loss() for batch_norm in ("batch", "running")}
    assert abs(loss["batch"] - loss["running"]) > 1e-3
    assert Objective(model.train(), [batch]).loss() == loss["batch"]
    assert Objective(model.eval(), [batch]).loss() == loss["running"]
    assert Objective(model, [batch], batch_norm="batch").policy == {"batch_norm": "batch", "dropout": "off"}
    with pytest.raises(ValueError, match="batch_norm must be"):
        Objective(model, [batch], batch_norm="train")


def test_dropout_is_off_or_fixed():
    model = _mlp(dropout=0.5).train()
    batches = [_batch()]
    off = Objective(model, batches)
    assert off.loss() == Objective(model.eval(), batches).loss()
    seeded = Objective(model, batches, dropout_seed=3)
    assert seeded.loss() == seeded.loss() != off.loss()
    H = seeded.hessian()
    v = torch.randn(H.shape[0]).double()
    recomputed = Objective(model, batches, dropout_seed=3, engine="recompute").hessian()
    torch.testing.assert_close(H @ v, recomputed @ v, rtol=0, atol=1e-14)
    state = torch.random.get_rng_state()
    seeded.gradient()
    assert torch.equal(state, torch.random.get_rng_state())


def test_operators_are_taken_at_the_parameters_of_their_construction():
    model = _mlp()
    H = Objective(model, [_batch()], engine="recompute").hessian()
    v = torch.ones(H.shape[0]).double()
    before = H @ v
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(H @ v, before)


# Precision, splitting, memory


def test_double_precision_on_request():
    model = _mlp().float()
    x, y = _batch()
    H = Objective(model, [(x.float(), y)], dtype=torch.float64).hessian()
    assert H.dtype == torch.float64
    expected = dense_hessian(model.double(), [(x.float().double(), y)], "cross_entropy")
    torch.testing.assert_close(dense_matrix(H), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("microbatch", [1, 5, None, "auto"])
def test_microbatches_change_nothing(microbatch):
    model, (x, y) = _mlp(), _batch(600)
    whole = Objective(model, [(x, y)], microbatch=None)
    ragged = Objective(model, [(x[:500], y[:500]), (x[500:], y[500:])], microbatch=microbatch)
    v = torch.randn(whole.num_parameters).double()
    assert ragged.loss() == pytest.approx(whole.loss(), abs=1e-13)
    torch.testing.assert_close(ragged.gradient(), whole.gradient(), rtol=0, atol=1e-13)
    torch.testing.assert_close(ragged.hessian() @ v, whole.hessian() @ v, rtol=0, atol=1e-13)
    torch.testing.assert_close(ragged.gauss_newton() @ v, whole.gauss_newton() @ v, rtol=0, atol=1e-13)


def test_auto_cuts_large_batches_for_the_cache_but_never_batch_statistics():
    network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 32 * 32, 3))
    x, y = torch.randn(512, 1, 32, 32), torch.randint(3, (512,))
    sizes = [b.size for b in Objective(network, [(x, y)]).batches]
    assert max(sizes) < 512
    assert sum(sizes) == 512
    big = (torch.randn(600, 4).double(), torch.randint(3, (600,)))
    assert len(Objective(_norm_network(), [big], batch_norm="batch").batches) == 1
    with pytest.raises(ValueError, match="microbatch would change batch statistics"):
        Objective(_norm_network(), [big], batch_norm="batch", microbatch=100)


def test_the_memory_budget_decides_how_much_is_kept():
    model, (x, y) = _mlp(), _batch(40)
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
    inner, batch = _mlp(), _batch(12)
    objective = Objective(Greedy(inner), [batch])
    with pytest.warns(RuntimeWarning, match="out of memory with 12 examples"):
        found = getattr(objective, quantity)()
    expected = getattr(Objective(inner, [batch]), quantity)()
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-14)
    with pytest.raises(torch.OutOfMemoryError):  # masks would change with the batches
        Objective(Greedy(inner), [batch], dropout_seed=0).loss()


def test_out_of_memory_shrinks_the_batches_and_says_so():
    inner, batch = _mlp(), _batch(12)
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

    inner, batch = _mlp(), _batch(12)
    with pytest.warns(RuntimeWarning, match="out of memory with 12 examples"):
        found = Objective(inner, [batch], GreedyLoss()).gradient()
    torch.testing.assert_close(found, Objective(inner, [batch]).gradient(), rtol=0, atol=1e-14)


def test_what_did_not_fit_is_let_go_before_less_is_tried():
    class Graph:
        pass

    held: list[weakref.ref] = []
    objective = Objective(_mlp(), [_batch(12)])

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


# Forms of the operators


def test_scipy_operator():
    from scipy.sparse.linalg import eigsh as scipy_eigsh

    H = Objective(_mlp(), [_batch()]).hessian()
    values = scipy_eigsh(H.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(sorted(values), eigsh(H, 3, tol=1e-9).values.flip(0), atol=1e-9)
    assert H.to_scipy().dtype == np.float64
    assert H.to_scipy().matmat(np.ones((H.shape[0], 2))).shape == (H.shape[0], 2)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_gram_matrix_gives_the_spectrum_of_gauss_newton(loss):
    model, (x, y) = _mlp(), _batch(7)
    targets = y if loss == "cross_entropy" else F.one_hot(y, 3).double()
    G = Objective(model, [(x[:4], targets[:4]), (x[4:], targets[4:])], loss).gauss_newton()
    values, vectors = gram_eigh(G)
    dense = dense_matrix(G)
    expected = torch.linalg.eigvalsh(dense).flip(0)
    torch.testing.assert_close(values, expected[: len(values)], rtol=0, atol=1e-12)
    assert expected[len(values)] < 1e-10
    torch.testing.assert_close(dense @ vectors, vectors * values, rtol=0, atol=1e-12)


def test_projected_gauss_newton():
    model, (x, y) = _mlp(), _batch()
    Q = torch.randn(sum(p.numel() for p in model.parameters()), 4).double()
    expected = Q.T @ dense_matrix(Objective(model, [(x, y)]).gauss_newton()) @ Q
    torch.testing.assert_close(projected_gauss_newton(model, x, y, "cross_entropy", Q), expected, rtol=0, atol=1e-12)


def test_any_callable_is_a_loss():
    def focal(z, y):
        p = z.softmax(1).gather(1, y[:, None])[:, 0]
        return (-((1 - p) ** 2) * p.log()).mean()

    model, (x, y) = _mlp(), _batch(6)
    objective = Objective(model, [(x, y)], focal)
    v = torch.randn(objective.num_parameters).double()
    h = 1e-5
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def gradient_at(theta):
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        return Objective(model, [(x, y)], focal).gradient()

    difference = (gradient_at(vector + h * v) - gradient_at(vector - h * v)) / (2 * h)
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    torch.testing.assert_close(objective.hessian() @ v, difference, rtol=1e-6, atol=1e-8)


RANDOM_LOSSES = {
    "noise": lambda z, y: F.cross_entropy(z + 0.5 * torch.randn_like(z), y),
    "dropout": lambda z, y: F.cross_entropy(F.dropout(z, 0.3), y),
    "a sample of the examples": lambda z, y: F.cross_entropy(z[(i := torch.randperm(len(z))[:6])], y[i]),
}


class NoisyLoss(nn.Module):
    def forward(self, z, y):
        return F.cross_entropy(z * torch.empty_like(z).uniform_(0.9, 1.1), y)


RANDOM_LOSSES["module"] = NoisyLoss()


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "hessian_by_differences", "empirical_fisher"])
@pytest.mark.parametrize("loss", RANDOM_LOSSES.values(), ids=RANDOM_LOSSES.keys())
def test_a_loss_that_draws_at_random_is_refused(loss, kind):
    objective = Objective(_mlp(), [_batch(12), _batch(5)], loss)
    with pytest.raises(
        RuntimeError, match=r"the loss \S+ is not deterministic: two evaluations of the same 12 outputs"
    ):
        getattr(objective, kind)()


# Iterables of batches


def _reusing(change):
    """Two batches in the same memory."""

    def loader(x, y):
        a, b = torch.empty(6, 4).double(), torch.empty(6).long()
        for part in (slice(0, 6), slice(6, 12)):
            yield change(a, b, x[part], y[part])

    return loader


def _in_place(a, b, x, y):
    return a.copy_(x), b.copy_(y)


def _one_row(a, b, x, y):
    a[3] = x[3]
    return a, y


def _without_versions(a, b, x, y):
    a.data.copy_(x)
    return a, y


def _arrays(a, b, x, y):
    return a.copy_(x).numpy(), y.numpy()


def _mapping(a, b, x, y):
    return {"input": a.copy_(x), "labels": y}


@pytest.mark.parametrize("change", [_in_place, _one_row, _without_versions, _arrays, _mapping])
def test_an_iterable_that_uses_its_memory_again(change):
    with pytest.raises(ValueError, match="batch 0 was overwritten while later ones were read"):
        Objective(_mlp(), _reusing(change)(*_batch(12)))


def test_an_iterable_may_yield_the_same_or_views_of_one_tensor():
    model, (x, y) = _mlp(), _batch(12)
    x[0, 0] = float("nan")
    assert len(Objective(model, ((x, y) for _ in range(2))).batches) == 2
    x[0, 0] = 1
    views = Objective(model, ((x[i : i + 5], y[i : i + 5].numpy()) for i in (0, 5, 10)))
    assert views.loss() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-12)


class Augmented(torch.utils.data.Dataset):
    """Draws from all generators."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(4).double() + random.random() + np.random.rand(), i % 3  # noqa: NPY002


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("read", [Objective, CurvatureMonitor])
def test_reading_a_loader_draws_nothing(read, shuffle, seeded):
    own = torch.Generator().manual_seed(5) if seeded else None
    loader = torch.utils.data.DataLoader(Augmented(), 5, shuffle=shuffle, generator=own)

    def states():
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            own.get_state().tolist() if own else None,
        ]

    model = _mlp()
    before = states()
    read(model, loader)
    assert states() == before


@pytest.mark.parametrize("read", [Objective, CurvatureMonitor])
def test_reading_a_loader_with_a_batch_sampler_draws_nothing_from_its_generator(read):
    own, data = torch.Generator().manual_seed(5), Augmented()
    order = torch.utils.data.RandomSampler(data, generator=own)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=torch.utils.data.BatchSampler(order, batch_size=5, drop_last=False)
    )
    before = own.get_state()
    read(_mlp(), loader)
    assert torch.equal(own.get_state(), before)


def _same_width() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)).double()


ONE_BY_ONE = {
    "linear": (lambda: nn.Linear(4, 4).double(), "mse"),
    "layers": (_same_width, "mse"),
    "torch's": (_same_width, nn.HuberLoss()),
    "a callable": (_same_width, lambda z, y: (z - y).square().mean()),
    "padding": (lambda: nn.Sequential(nn.ConstantPad1d(1, 0.0), nn.Linear(6, 4)).double(), "mse"),
}


@pytest.mark.parametrize(("make", "loss"), ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())
def test_examples_one_by_one_are_not_taken_for_batches(make, loss):
    model, (x, _) = make(), _batch()
    for batches in ([(a, a) for a in x], (x[0], x[0]), [((a,), a) for a in x]):
        with pytest.raises(ValueError, match=r"batch 0, inputs \(4,\) and targets \(4,\), seems to be one example"):
            Objective(model, batches, loss)
    together = Objective(model, [(a[None], a[None]) for a in x], loss)
    assert together.loss() == pytest.approx(Objective(model, (x, x), loss).loss(), abs=1e-12)


class Curve(nn.Module):
    """Takes numbers, one an example."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x):
        return self.inner(x[:, None])[:, 0]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_batches_of_numbers(n):
    model, x = Curve(), torch.randn(n).double()
    expected = 0.5 * (model(x) - x).square().mean().item()
    assert Objective(model, (x, x), "mse").loss() == pytest.approx(expected, abs=1e-12)


def test_a_model_of_a_fixed_number_of_inputs_is_taken_at_the_users_word():
    model, x = nn.Linear(4, 4).double(), torch.randn(4).double()
    expected = 0.5 * (model(x) - x).square().sum().item() / 4
    assert Objective(model, (x, x), "mse", batched=[0]).loss() == pytest.approx(expected, abs=1e-12)
    assert Objective(model, (x, x), "mse", batched=()).loss() == pytest.approx(expected, abs=1e-12)


# Bad input: one line that says what and where


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.inner(x) + torch.randn(len(x), 3)


def _all_frozen() -> nn.Module:
    return nn.Linear(4, 3).double().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: Objective(_all_frozen(), [(x, y)]), ValueError, "no parameter with requires_grad=True"),
        (lambda x, y: Objective(_mlp(), []), ValueError, "at least one batch"),
        (lambda x, y: Objective(_mlp(), [(x, y), (x, y[:5])]), ValueError, "batch 1 has 12 inputs but 5 targets"),
        (lambda x, y: Objective(_mlp(), [(x[:0], y[:0])]), ValueError, "batch 0 is empty"),
        (lambda x, y: Objective(_mlp(), [(x, y)], "hinge"), ValueError, "unknown loss 'hinge'"),
        (lambda x, y: Objective(_mlp(), [(x, y)], engine="fast").hessian(), ValueError, "engine must be"),
        (lambda x, y: Objective(_mlp(), [(x, y + 9)]).loss(), ValueError, "batch 0: the loss cross_entropy failed"),
        (lambda x, y: Objective(_mlp(), [(x, y)], "mse").loss(), ValueError, r"mse needs targets of shape \(12, 3\)"),
        (lambda x, y: Objective(_mlp(), [(x / 0, y)]).gradient(), ValueError, "batch 0: the loss is nan"),
        (lambda x, y: Objective(Noisy(), [(x, y)]).hessian(), RuntimeError, "Noisy is not deterministic"),
        (
            lambda x, y: Objective(_mlp(), [(x, y)]).hessian() @ torch.ones(5).double(),
            ValueError,
            r"Hessian of shape \(51, 51\) cannot multiply a tensor of shape \(5,\)",
        ),
        (lambda x, y: dense_matrix(Objective(_mlp(), [(x, y)]).hessian(), limit=50), ValueError, "P = 51 is above"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make(*_batch())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_a_loss_that_is_nan_in_the_second_batch(kind):
    x, y = _batch()
    operator = getattr(Objective(_mlp(), [(x, y), (x * float("inf"), y)]), kind)()
    with pytest.raises(ValueError, match="batch 1: the loss is nan"):
        operator @ torch.ones(51).double()


# Traps of the framework, each of which would be a silent error or a crash


@pytest.mark.parametrize("name", ["layernorm", "batchnorm-batch"])
def test_layers_through_which_jacrev_under_a_derivative_goes_wrong(name):
    """torch.func.hessian is asymmetric through these layers, without a word; plain double backward is not."""
    case = CASES[name]
    model, batches = case.make()
    H = dense_matrix_of(model, batches, case)
    torch.testing.assert_close(H, H.T, rtol=0, atol=1e-12)
    assert (H - dense_hessian(model.train(case.batch_norm == "batch"), batches, case.loss)).abs().max() < 1e-12


def dense_matrix_of(model, batches, case):
    H = Objective(model, batches, case.loss, batch_norm=case.batch_norm).hessian()
    return H @ torch.eye(H.shape[0]).double()  # not symmetrised


def test_batched_derivatives_fall_back_to_the_loop():
    model, batches = CASES["groupnorm-residual"].make()
    H = Objective(model, batches).hessian()
    V = torch.randn(H.shape[0], 4).double()
    expected = H @ V
    H.vectors_at_once = 4
    torch.testing.assert_close(H @ V, expected, rtol=0, atol=1e-12)


class _Asking(torch.autograd.Function):
    """Asks for a number on its way back, which derivatives of several vectors at once do not have."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp() if float(g.detach().abs().sum()) < 1e9 else g


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_the_loop_takes_over_for_all_vectors_that_are_left(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(_Asking.apply(self.a(x)))

    torch.manual_seed(0)
    model, batches = Model().double(), [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in (7, 5)]
    operator = getattr(Objective(model, batches), kind)()
    V = torch.randn(operator.shape[0], 11).double()
    expected = operator @ V
    operator.vectors_at_once = 4
    torch.testing.assert_close(operator @ V, expected, rtol=0, atol=1e-12)
    assert operator.vectors_at_once == 1, "torch can batch this by now: take another example"


def test_attention_has_second_derivatives_though_its_fused_kernel_has_none():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    fused = F.scaled_dot_product_attention(q, q, q).square().sum()
    (g,) = torch.autograd.grad(fused, q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(g.sum(), q)
    model, batches = CASES["fused-attention"].make()
    H = Objective(model, batches).hessian()
    assert torch.isfinite(H @ torch.ones(H.shape[0]).double()).all()


def test_old_and_unknown_options():
    batch = _batch()
    with pytest.raises(ValueError, match="state='batch' is now batch_norm"):
        Objective(_mlp(), batch, state="batch")
    with pytest.raises(ValueError, match="method='vjp' is now algorithm"):
        class_gradients(_mlp(), *batch, 3, method="vjp")
    with pytest.raises(TypeError, match="Objective has no option 'engines'"):
        Objective(_mlp(), batch, engines="auto")


class Derivative(nn.Module):
    """Outputs made of the first or second derivative of a network in its inputs, or of that and the network itself."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        z = x.detach().requires_grad_()
        e = self.energy(z)
        (slope,) = torch.autograd.grad(e.sum(), z, create_graph=True)
        if self.kind == "twice":
            (slope,) = torch.autograd.grad(slope.square().sum(), z, create_graph=True)
        return self.head(slope if self.kind != "both" else slope + e)


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("kind", ["once", "twice", "both"])
def test_a_model_that_takes_derivatives_in_its_inputs(kind, n):
    torch.manual_seed(0)
    model = Derivative(kind).double()
    x, y = torch.randn(n, 4).double(), torch.randint(3, (n,))
    objective = Objective(model, [(x, y)])
    theta = parameter_vector(model)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(1)).double()
    assert objective.loss() == pytest.approx(F.cross_entropy(model(x), y).item())
    product, by_differences = objective.hessian() @ v, objective.hessian_by_differences() @ v
    gauss_newton = objective.gauss_newton() @ v
    assert float(v @ gauss_newton) > 0
    slope, h = float(objective.gradient() @ v), 1e-5
    values, gradients = [], []
    for sign in (1, -1):
        assign_parameters(model, theta + sign * h * v)
        values.append(objective.loss())
        gradients.append(objective.gradient())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)
    torch.testing.assert_close(product, (gradients[0] - gradients[1]) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(by_differences, product, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", [lambda m: m[0].weight.requires_grad_(False), lambda m: m.pop(3)])
@pytest.mark.parametrize("use", ["refresh", "loss", "gradient", "num_parameters", "hessian"])
def test_trainable_parameters_that_have_changed_since(change, use):
    model = _mlp()
    objective = Objective(model, [_batch()])
    operator = objective.hessian()
    change(model)
    with pytest.raises(RuntimeError, match=r"'\d.weight'.* is frozen or gone since this objective"):
        getattr(operator if use == "refresh" else objective, use)()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Objective(model, [_batch()]).gradient().shape == (trainable,)


class Fields(nn.Module):
    """Reads its inputs, or one of them, by name."""

    def __init__(self, nested: bool):
        super().__init__()
        self.nested, self.layer = nested, nn.Linear(4, 3)

    def forward(self, first, scale):
        x = first.x * first.mask if self.nested else first
        return self.layer(x) * scale


class Inner(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor


class Outer(NamedTuple):
    first: Any
    scale: torch.Tensor


class Labels(NamedTuple):
    classes: torch.Tensor
    weights: np.ndarray | torch.Tensor


def _weighted(outputs, targets):
    losses = F.cross_entropy(outputs, targets.classes, reduction="none")
    return (losses * targets.weights).mean()


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("nested", [False, True])
def test_named_tuples_keep_their_names(nested, n):
    torch.manual_seed(0)
    model = Fields(nested).double()
    x, y = _batch(n)
    mask, scale, weights = torch.rand(n, 4).double(), torch.full((), 2.0).double(), torch.rand(n).double()
    inputs = Outer(Inner(x, mask) if nested else x * mask, scale)
    objective = Objective(model, [(inputs, Labels(y, weights.numpy()))], _weighted, microbatch="auto")

    def doubled(z, y):
        return _weighted(2 * z, Labels(y, weights))

    linear = Objective(nn.Sequential(model.layer), [((x * mask,), y)], doubled, microbatch=None)
    assert objective.loss() == pytest.approx(linear.loss())
    torch.testing.assert_close(objective.gradient(), linear.gradient())
    torch.testing.assert_close(dense_matrix(objective.hessian()), dense_matrix(linear.hessian()))
    classes = Objective(model, [(inputs, y)])
    assert classes.loss() == pytest.approx(F.cross_entropy(model(*inputs), y).item())
    single = class_gradients(model, inputs, y, 3)[0]
    torch.testing.assert_close(single, class_gradients(model, tuple(inputs), y, 3)[0])


class Graph(nn.Module):
    """A layer whose examples are joined by a sparse matrix: an attribute, a buffer, or an input."""

    def __init__(self, place: str, adjacency: torch.Tensor):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        if place == "attribute":
            self.adjacency = adjacency
        if place == "buffer":
            self.register_buffer("adjacency", adjacency)

    def forward(self, x, adjacency=None):
        return (self.adjacency if adjacency is None else adjacency) @ self.layer(x)


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.parametrize("place", ["attribute", "buffer", "input"])
@pytest.mark.parametrize("n", [12, 300])
def test_sparse_tensors(place, layout, n):
    torch.manual_seed(0)
    dense = torch.rand(n, n).double() * (torch.rand(n, n) < 0.1)
    adjacency = getattr(dense, layout)()
    model, reference = (Graph(place, a).double() for a in (adjacency, dense))
    reference.layer.load_state_dict(model.layer.state_dict())
    x, y = _batch(n)
    objective, expected = (
        Objective(m, [((x, a) if place == "input" else x, y)]) for m, a in ((model, adjacency), (reference, dense))
    )
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(1)).double()
    assert objective.loss() == pytest.approx(expected.loss())
    torch.testing.assert_close(objective.gradient(), expected.gradient())
    for kind in ("hessian", "gauss_newton"):
        torch.testing.assert_close(getattr(objective, kind)() @ v, getattr(expected, kind)() @ v)


class FunctionalSlope(nn.Module):
    """Outputs made of a network's derivative in its inputs, by ``torch.func``."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform
        self.energy, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.transform(lambda z: self.energy(z).sum(), x))


TRANSFORMS = {
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_model_that_uses_functional_transforms(transform, n):
    torch.manual_seed(0)
    model = FunctionalSlope(TRANSFORMS[transform]).double()
    x, y = _batch(n)
    objective = Objective(model, [(x, y)])
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(objective.hessian() @ v, central_difference(model, [(x, y)], "cross_entropy", v))
    kept = Objective(model, [(x, y)], engine="linearize").gauss_newton() @ v
    torch.testing.assert_close(objective.gauss_newton() @ v, kept)


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


SCRIPTED = {
    "script": (lambda m, x: torch.jit.script(m), "it was compiled by torch.jit.script"),
    "trace": (torch.jit.trace, "it was compiled by torch.jit.script or torch.jit.trace"),
    "one module": (lambda m, x: nn.Sequential(torch.jit.script(m)), "its module '0' was compiled"),
    "a module in a module": (lambda m, x: Holder(nn.Sequential(torch.jit.script(m[0]), *m[1:])), "'inner.0'"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", SCRIPTED)
def test_a_scripted_model_is_refused(kind):
    x, y = _batch()
    make, message = SCRIPTED[kind]
    model = make(_mlp(), x)
    with pytest.raises(TypeError, match=message):
        Objective(model, [(x, y)])
    with pytest.raises(TypeError, match=message):
        class_gradients(model, x, y, 3)


# Whether autograd's gradient is the loss's derivative


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


def _clipped(h):
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return h


def _shut(h):
    with torch.no_grad():
        return h.tanh()


class _Middle(nn.Module):
    def __init__(self, f, size: int = 5):
        super().__init__()
        self.first, self.f, self.last = nn.Linear(4, size), f, nn.Linear(size, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.f(self.first(x))))


OWN_DERIVATIVES = {
    "reversed": _Reversed.apply,
    "detached norm": lambda h: h / h.detach().norm(dim=1, keepdim=True),
    "straight through": lambda h: h + (h.round() - h).detach(),
    "hook": _clipped,
    "no_grad": _shut,
}
HONEST = {
    "smooth": torch.sin,
    "kinks": F.relu,
    "jumps": lambda h: h * (h > 0.3),
    "rounded": lambda h: h.float().double(),
}


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("name", [*OWN_DERIVATIVES, *HONEST])
def test_a_gradient_that_is_no_derivative_is_said_once(name, matrix):
    torch.manual_seed(0)
    model = _Middle((OWN_DERIVATIVES | HONEST)[name]).double()
    objective = Objective(model, [_batch()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(objective, matrix)(), getattr(objective, matrix)()
    assert sum("not the derivative of the loss" in str(w.message) for w in caught) == (name in OWN_DERIVATIVES)


class _Cube(torch.autograd.Function):
    """Its backward pass has the right value, in a form that autograd cannot differentiate."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return x**3

    @staticmethod
    def backward(ctx, g):
        return ctx.slope(g, *ctx.saved_tensors), None


class _Fused(torch.autograd.Function):
    """A loss that computes its gradient in the forward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.gradient = (z.softmax(1) - F.one_hot(y, 3)) / len(z)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.gradient, None


def _under_no_grad(g, x):
    with torch.no_grad():
        return 3 * x**2 * g


def _implicit(h):
    """The fixed point z of tanh(0.3 z W + h), whose cotangent a hook solves for."""
    w = torch.linspace(-1, 1, 25).view(5, 5).to(h)
    with torch.no_grad():
        z = torch.zeros_like(h)
        for _ in range(60):
            z = torch.tanh(0.3 * z @ w + h)
    z = torch.tanh(0.3 * z @ w + h)
    if z.requires_grad:
        here = z.detach().requires_grad_()
        there = torch.tanh(0.3 * here @ w + h.detach())

        def solve(g):
            found = g
            for _ in range(60):
                found = g + torch.autograd.grad(there, here, found, retain_graph=True)[0]
            return found

        z.register_hook(solve)
    return z


NOT_DIFFERENTIABLE = {  # function, and for which matrices that matters
    "constant": (lambda h: _Cube.apply(h, lambda g, x: 3 * x.detach() ** 2 * g), ["hessian"]),
    "no_grad": (lambda h: _Cube.apply(h, _under_no_grad), ["hessian", "gauss_newton", "empirical_fisher"]),
    "numpy": (
        lambda h: _Cube.apply(h, lambda g, x: torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())),
        ["hessian", "gauss_newton", "empirical_fisher"],
    ),
    "implicit": (_implicit, ["hessian", "gauss_newton", "empirical_fisher"]),
    "fused loss": (torch.sin, ["hessian", "gauss_newton"]),
}


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_a_backward_pass_that_autograd_cannot_differentiate(name, matrix):
    torch.manual_seed(0)
    f, wrong = NOT_DIFFERENTIABLE[name]
    model, (x, y) = _Middle(f).double(), _batch()
    objective = Objective(model, [(x, y)], _Fused.apply if name == "fused loss" else "cross_entropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if matrix not in wrong:
            getattr(objective, matrix)()
            return
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"_Middle with the loss .* is off by .* of the difference of first"):
                getattr(objective, matrix)()
        if name == "fused loss":
            objective = Objective(model, [(x, y)])
        v = torch.ones(objective.num_parameters).double()
        expected = central_difference(model, [(x, y)], "cross_entropy", v)
        torch.testing.assert_close(objective.hessian_by_differences() @ v, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"scale_grad_by_freq": True}, "scale_grad_by_freq"), ({"max_norm": 0.5}, "max_norm"), ({"padding_idx": 0}, None)],
)
def test_embeddings_whose_gradient_is_no_derivative(options, said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, **options), nn.Flatten(), nn.Linear(9, 3)).double()
    batch = torch.tensor([[1, 1, 1], [1, 2, 3], [0, 1, 4], [2, 2, 0]]), torch.tensor([0, 1, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(model, [batch], parameters="2.*").hessian()
        if said is None:
            Objective(model, [batch]).hessian()
            return
        with pytest.raises(ValueError, match=f"the embedding '0' has {said}"):
            Objective(model, [batch]).hessian()


def test_two_parameters_in_one_memory_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = nn.Parameter(model[0].weight.data)
    with pytest.warns(RuntimeWarning, match=r"'0.weight' and '2.weight' lie in the same memory"):
        Objective(model, [_batch()]).hessian()


class _Gate(nn.Module):
    """A layer that some draws leave out, from one generator or another."""

    def __init__(self, draw, effect: float):
        super().__init__()
        self.head, self.draw, self.effect = nn.Linear(4, 3), draw, effect

    def forward(self, x):
        z = self.head(x)
        return z + self.effect * torch.tanh(z) if self.draw() > 0.3 else z


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), random.random, np.random.random], ids=["torch", "python", "numpy"]
)
@pytest.mark.parametrize("effect", [1.0, 0.0])
def test_a_draw_that_two_seeds_do_not_show(draw, effect):
    torch.manual_seed(0)
    objective = Objective(_Gate(draw, effect).double(), [_batch()])
    if not effect:  # what is drawn need not matter
        objective.hessian()
        return
    with pytest.raises(RuntimeError, match="_Gate is not deterministic"):
        objective.hessian()


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(torch.tanh(self.body(self.embed(i))))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("head.*", ["embed.weight", "head.bias"]),
        ("head.weight", ["embed.weight"]),
        (["head.weight", "embed.weight", "body.bias"], ["embed.weight", "body.bias"]),
    ],
)
def test_a_tied_parameter_has_each_of_its_names(names, found):
    batch = torch.arange(7), torch.arange(7)
    model = _Tied()
    assert Objective(model, [batch]).part(names).function.names == found
    assert Objective(model, [batch], parameters=names).function.names == found
    assert Objective(model, [batch], parameters=["head.bias", "body.*"]).part("head.*").function.names == ["head.bias"]


@pytest.mark.parametrize("name", ["hessian", "empirical_fisher"])
def test_the_gram_matrix_is_of_gauss_newton(name):
    with pytest.raises(ValueError, match="needs a Gauss-Newton matrix"):
        gram_eigh(getattr(Objective(_mlp(), [_batch()]), name)())


def test_the_gram_matrix_of_zero():
    with pytest.warns(RuntimeWarning, match="linear in the outputs"):
        values, vectors = gram_eigh(
            Objective(nn.Sequential(_mlp(), nn.LogSoftmax(1)), [_batch()], "nll_loss").gauss_newton()
        )
    assert values.shape == (0,)
    assert vectors.shape == (51, 0)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.h = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, packed):
        return self.h(self.r(packed)[1][-1])


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: (p,), lambda p: {"packed": p}])
def test_a_packed_sequence_is_one_input(wrap, sort):
    torch.manual_seed(0)
    lengths, y, model = sorted([3, 5, 2, 5, 1, 4, 2, 3], reverse=True), torch.randint(2, (8,)), Packed().double()
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3).double() for n in lengths], enforce_sorted=sort)
    objective = Objective(model, [(wrap(packed), y)], batched=() if sort else None)
    v = torch.randn(objective.num_parameters).double()
    assert objective.loss() == pytest.approx(F.cross_entropy(model(packed), y).item())
    expected = objective.hessian_by_differences() @ v
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)
