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
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.utils.checkpoint import checkpoint

from curvspace import Objective, class_gradients, eigsh, optim
from curvspace.curvature import (
    cross_class_gradients,
    dense_matrix,
    gram_eigh,
    hutchpp,
    projected_gauss_newton,
    spectral_density,
)
from curvspace.inputs import tensors_in
from curvspace.landscape import LossScanner
from curvspace.monitor import CurvatureMonitor
from tests.unit.architectures import CASES


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


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(5, 4), nn.Linear(4, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=self.reentrant))


def _reals(n: int) -> Tensor:
    return torch.randn(n, 5, dtype=torch.float64)


MORE: dict[str, Callable[[], nn.Module]] = {
    "one module, two names": Siamese,
    "keeps things": Keeps,
    "LSTM": Recurrent,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "older weight_norm": lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3)),
    "checkpoint": lambda: Checkpointed(False),
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_nothing_elsewhere(reentrant):
    """A recomputation in the backward pass would see the parameters of then."""
    torch.manual_seed(0)
    model, (x, y) = Checkpointed(reentrant).double(), (_reals(9), torch.randint(3, (9,)))
    plain = nn.Sequential(model.a, nn.Tanh(), model.b)
    v = torch.randn(39).double()
    expected = Objective(plain, (x, y)).hessian() @ v
    H = Objective(model, (x, y)).hessian()
    torch.testing.assert_close(H @ v, expected, rtol=0, atol=1e-14)
    with torch.no_grad():
        model.a.weight.mul_(3)
    torch.testing.assert_close(H @ v, expected, rtol=0, atol=1e-14)
    H.refresh()
    torch.testing.assert_close(H @ v, Objective(plain, (x, y)).hessian() @ v, rtol=0, atol=1e-14)


class Held(nn.Module):
    """Reaches some parameters through a plain list."""

    def __init__(self, held: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
        self.ws = list(self.parameters())[:held]

    def forward(self, x: Tensor) -> Tensor:
        parameters = [*self.ws, *list(self.parameters())[len(self.ws) :]]
        return F.linear(torch.tanh(F.linear(x, *parameters[:2])), *parameters[2:])


@pytest.mark.parametrize("held", [1, 4])
@pytest.mark.parametrize(
    "compute",
    [
        lambda model, x, y: Objective(model, (x, y)).gradient(),
        lambda model, x, y: Objective(model, (x, y)).hessian() @ torch.ones(39).double(),
        lambda model, x, y: Objective(model, (x, y)).gauss_newton() @ torch.ones(39).double(),
        lambda model, x, y: class_gradients(model, x, y, 3),
    ],
)
def test_parameters_in_a_list(compute, held):
    torch.manual_seed(0)
    model, x, y = Held(held).double(), _reals(9), torch.randint(3, (9,))
    with pytest.raises(ValueError, match=r"Held.* (use a.weight|depends on none)"):
        compute(model, x, y)
    model.ws = []
    compute(model, x, y)


def test_parameters_used_outside_of_the_call():
    torch.manual_seed(0)
    table, model = nn.Embedding(7, 5).double(), nn.Linear(5, 3).double()
    both = nn.ModuleDict({"table": table, "model": model})
    both.forward = model.forward  # type: ignore[method-assign]
    x = table(torch.randint(7, (9,)))
    with pytest.raises(ValueError, match=r"use table.weight by references kept outside"):
        Objective(both, (x, torch.randint(3, (9,)))).gradient()


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_loss_that_reads_the_parameters(by_reference):
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
        _reals(300),
        torch.randint(3, (300,)),
    )
    held = list(model.parameters())

    def loss(z: Tensor, y: Tensor) -> Tensor:
        parameters = held if by_reference else model.parameters()
        return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in parameters)

    objective = Objective(model, (x, y), loss)
    if by_reference:
        for compute in (objective.gradient, lambda: objective.hessian() @ torch.ones(39).double()):
            with pytest.raises(ValueError, match="by references kept outside"):
                compute()
        return
    plain, eye = Objective(model, (x, y)), torch.eye(39).double()
    theta = torch.cat([p.detach().flatten() for p in held])
    torch.testing.assert_close(objective.gradient(), plain.gradient() + 0.2 * theta)
    torch.testing.assert_close(objective.hessian() @ eye, plain.hessian() @ eye + 0.2 * eye)
    torch.testing.assert_close(objective.gauss_newton() @ eye, plain.gauss_newton() @ eye + 0.2 * eye)
    G = objective.gauss_newton()
    G.vectors_at_once = 4
    torch.testing.assert_close(G @ eye, plain.gauss_newton() @ eye + 0.2 * eye)
    parts = Objective(model, (x, y), loss, microbatch=50)
    torch.testing.assert_close(parts.hessian() @ eye, plain.hessian() @ eye + 0.2 * eye)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.a(x))
        h *= 2.0  # sigmoid's derivative needs its output
        return self.b(h)


@pytest.mark.parametrize("engine", ["auto", "linearize", "recompute"])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_changes_in_place(engine, kind):
    torch.manual_seed(0)
    x, y, v = _reals(9), torch.randint(3, (9,)), torch.ones(39).double()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        getattr(Objective(InPlace().double(), (x, y), engine=engine), kind)() @ v
    for change in (lambda: x.mul_(2), lambda: y.zero_()):
        plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        operator = getattr(Objective(plain, (x, y), engine=engine), kind)()
        operator @ v
        change()
        with pytest.raises(RuntimeError, match="batch 0 has been modified by an inplace operation"):
            operator @ v


def test_inference_mode():
    torch.manual_seed(0)
    model, x, y, v = nn.Linear(5, 3).double(), _reals(9), torch.randint(3, (9,)), torch.ones(18).double()
    expected = Objective(model, (x, y)).hessian() @ v
    with torch.inference_mode():
        objective = Objective(model, (x + 0, y))
        assert objective.loss() > 0
        torch.testing.assert_close(objective.hessian() @ v, expected)
        torch.testing.assert_close(objective.gauss_newton() @ v, expected)
        assert class_gradients(model, x, y, 3)[0].any()
        frozen = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="requires_grad=True"):
        Objective(frozen.requires_grad_(False), (x, y))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


COMPUTATIONS: dict[str, Callable[[Objective], Any]] = {
    "eigsh": lambda o: eigsh(o.hessian(), 2).values,
    "Gauss-Newton eigsh": lambda o: eigsh(o.gauss_newton(), 2).values,
    "differences": lambda o: o.hessian_by_differences() @ torch.ones(o.num_parameters).double(),
    "Fisher": lambda o: o.empirical_fisher() @ torch.ones(o.num_parameters, 2).double(),
    "density": lambda o: spectral_density(o.hessian(), steps=5, probes=2).density,
    "trace": lambda o: hutchpp(o.hessian(), 9).value,
    "gram_eigh": lambda o: gram_eigh(o.gauss_newton())[0],
    "dense": lambda o: dense_matrix(o.hessian()),
    "projected": lambda o: projected_gauss_newton(
        o.model, *_plain_batch(), "cross_entropy", torch.eye(o.num_parameters).double()[:, :3]
    ),
    "monitor": lambda o: CurvatureMonitor(o.model, [_plain_batch()], k=1, share=None).measure(0)["sharpness"],
    "landscape": lambda o: LossScanner(o).along(torch.ones(o.num_parameters).double(), [0.0, 0.1]),
}


def _plain_batch(n: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=generator).double(), torch.arange(n) % 3


@pytest.mark.parametrize("n", [9, 300])
@pytest.mark.parametrize("inside", ["nothing", "batch", "batch and model"])
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_every_computation_leaves_inference_mode(name, inside, n):
    model, batch = _network(), _plain_batch(n)
    expected = COMPUTATIONS[name](Objective(model, batch))
    with torch.inference_mode():
        model = _network() if inside == "batch and model" else model
        batch = _plain_batch(n) if inside != "nothing" else batch
        found = COMPUTATIONS[name](Objective(model, batch))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_kinds_of_parameters():
    model = nn.Linear(5, 3)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="parameter 'phase' is complex"):
        Objective(model, (torch.zeros(2, 5), torch.zeros(2).long()))
    mixed = nn.Sequential(nn.Linear(5, 4).bfloat16(), nn.Linear(4, 3))
    objective = Objective(mixed, (torch.ones(2, 5), torch.zeros(2).long()))
    H = objective.hessian()
    assert H.dtype == torch.float32
    assert H.rounding == torch.finfo(torch.float32).eps
    assert Objective(nn.Linear(5, 3).bfloat16(), (torch.ones(2, 5), torch.zeros(2).long())).hessian().rounding == 2**-7


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models(in_place):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y, v = _reals(9), torch.randint(3, (9,)), torch.ones(39).double()
    expected = Objective(inner, (x, y)).hessian() @ v
    compiled = nn.Sequential(torch.compile(inner[:2], backend="aot_eager"), inner[2])
    if in_place:
        compiled = copy.deepcopy(inner)
        compiled.compile(backend="aot_eager")
    torch.testing.assert_close(Objective(compiled, (x, y)).hessian() @ v, expected, rtol=0, atol=1e-14)
    whole = torch.compile(inner, backend="aot_eager")
    torch.testing.assert_close(Objective(whole, (x, y)).hessian() @ v, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bag", [False, True])
def test_sparse_embeddings(bag):
    torch.manual_seed(0)
    kind = nn.EmbeddingBag if bag else nn.Embedding
    model = nn.Sequential(kind(7, 5, sparse=True), nn.Tanh(), *([] if bag else [nn.Flatten()]))
    model.append(nn.Linear(5 if bag else 20, 3))
    model, x, y = model.double(), torch.randint(7, (9, 4)), torch.randint(3, (9,))
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    sparse, dense = Objective(model, (x, y)), Objective(dense, (x, y))
    assert model[0].sparse
    torch.testing.assert_close(sparse.gradient(), dense.gradient())
    if bag:  # torch has no second derivative of it
        with pytest.raises(RuntimeError, match="not implemented"):
            sparse.hessian() @ torch.ones(sparse.num_parameters).double()
        return
    v = torch.randn(sparse.num_parameters).double()
    torch.testing.assert_close(sparse.hessian() @ v, dense.hessian() @ v)
    torch.testing.assert_close(sparse.gauss_newton() @ v, dense.gauss_newton() @ v)


def test_curvature_inside_autocast_is_that_of_the_parameters_type():
    torch.manual_seed(0)
    model, x, y, v = nn.Linear(5, 3), _reals(9).float(), torch.randint(3, (9,)), torch.randn(18)
    objective = Objective(model, (x, y))

    def quantities() -> list[Tensor]:
        H, G = objective.hessian(), objective.gauss_newton()
        return [
            *[objective.gradient(), H @ v, G @ v, gram_eigh(G)[0], torch.tensor(hutchpp(H, 9).value)],
            spectral_density(H, steps=5, probes=2).nodes,
            projected_gauss_newton(model, x, y, "cross_entropy", v[:, None]),
        ]

    expected = quantities()
    with torch.autocast("cpu", torch.bfloat16):
        found = quantities()
        assert eigsh(objective.hessian(), 2).converged
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Notes(nn.Module):
    """Keeps state in containers and arrays, and layers where PyTorch does not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
        self.stats: dict[str, Any] = {"calls": 0, "mean": torch.zeros(4).double(), "deep": [[0]]}
        self.log: list[Any] = []
        self.seen, self.pair, self.array = {0}, (torch.zeros(()), [0]), np.zeros(2)
        self.same = self.stats
        self.layers = {"norm": [nn.BatchNorm1d(4).double(), nn.Dropout(0.5)]}

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
    model, (x, y) = Notes().double(), _plain_batch()
    norm, dropout = model.layers["norm"]
    norm.running_mean.uniform_(-1, 1)
    kept = norm.running_mean.clone()
    plain = nn.Sequential(model.a, copy.deepcopy(norm).requires_grad_(False), nn.Tanh(), model.b)
    v = torch.randn(39).double()
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
        self.a = nn.Linear(5, 3)
        if buffer:
            self.register_buffer("table", torch.zeros(2**18 + 1))
        else:
            self.table = torch.zeros(2**18 + 1)

    def forward(self, x: Tensor) -> Tensor:
        self.table[0] += 1
        return self.a(x)


def test_a_large_plain_tensor_that_forward_writes():
    x, y = _plain_batch()
    with pytest.warns(
        RuntimeWarning, match=r"changed Large.table, a plain tensor of 1.0 MiB .* register it as a buffer"
    ):
        Objective(Large(False).double(), (x, y)).loss()
    model = Large(True).double()
    Objective(model, (x, y)).loss()
    assert not model.table.any()


class OwnNorm(nn.Module):
    """Batch normalisation that a user has written, and a dropout that no class tells."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class OwnDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", ["batch", "running", None])
def test_a_normalisation_and_a_dropout_of_ones_own(batch_norm, training):
    torch.manual_seed(0)
    a, b, (x, y) = nn.Linear(5, 4), nn.Linear(4, 3), _plain_batch()
    ours, theirs = (
        nn.Sequential(a, norm, OwnDropout(), b).double().train(training)
        for norm in (OwnNorm(), nn.BatchNorm1d(4, affine=False))
    )
    found, expected = (Objective(m, (x, y), batch_norm=batch_norm) for m in (ours, theirs))
    assert found.policy == expected.policy
    torch.testing.assert_close(found.loss(), expected.loss())
    torch.testing.assert_close(found.gradient(), expected.gradient())
    assert not ours[1].running_mean.any()
    assert ours[1].training is ours[2].training is training


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


@pytest.mark.parametrize("warm", [False, True])
def test_inside_a_cache_of_parametrised_weights(warm):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double(), _plain_batch()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    objective = Objective(model, (x, y))
    v = torch.randn(objective.num_parameters).double()
    computations: list[Callable[[], Tensor]] = [
        objective.gradient,
        lambda: objective.hessian() @ v,
        lambda: objective.gauss_newton() @ v,
        lambda: objective.hessian_by_differences() @ v,
        lambda: class_gradients(model, x, y, 3)[0],
    ]
    expected = [compute() for compute in computations]
    with parametrize.cached():
        kept = model[0].weight if warm else None
        for compute, value in zip(computations, expected, strict=True):
            torch.testing.assert_close(compute(), value, rtol=0, atol=0)
        assert not warm or model[0].weight is kept


@pytest.mark.parametrize("attribute", [False, True])
def test_a_loss_that_reads_what_forward_keeps(attribute):
    torch.manual_seed(0)
    model, (x, y) = _network(), _plain_batch()
    model.kept = None if attribute else []

    def keep(_: nn.Module, __: Any, h: Tensor) -> None:
        if attribute:
            model.kept = h
        else:
            model.kept.append(h)

    model[1].register_forward_hook(keep)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + (model.kept if attribute else model.kept[-1]).square().mean()

    objective = Objective(model, (x, y), loss)
    v = torch.randn(39).double()
    expected = objective.hessian_by_differences() @ v
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)
    assert not model.kept


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
    model, (x, y), loss = _network(), _plain_batch(), GLOBAL if way == "global" else Centred().double()
    objective, before = Objective(model, (x, y), HELD[way](loss)), loss.held()
    v = torch.randn(39).double()
    values = objective.loss(), *LossScanner(objective).along(v, [0.0])
    assert values == pytest.approx([copy.deepcopy(loss)(model(x), y).item()] * 2)
    expected = objective.hessian_by_differences() @ v
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)
    objective.gauss_newton() @ v
    for a, b in zip(loss.held(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    optim.FirstOrder(model, torch.optim.SGD, HELD[way](loss), lr=0.1).step(x, y)  # training does move it
    assert loss.held()[0] == 1 + before[0]
