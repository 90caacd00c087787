"""The page ``docs/situations.md``: each of its rows is tried here, right or with the error that it names."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from curvspace import Objective, class_gradients
from tests.unit.backward_passes import OnceTanh, by_hand
from tests.unit.oracles import derivative_along
from tests.unit.small_networks import Fn, minibatch, mlp

PAGE = Path(__file__).parents[2] / "docs" / "situations.md"
N = 40
WEIGHT = torch.tensor([0.2, 1.0, 3.0]).double()
IN_NUMPY = by_hand(torch.square, lambda g, x: torch.from_numpy(2 * x.detach().numpy() * g.detach().numpy()))


def _head(f: Callable[..., Any], **parts: Any) -> nn.Module:
    return Fn(f, h=nn.Linear(4, 3), **parts).double()


def _check(model: nn.Module, batch: Any, loss: Any, value: Callable[[], Tensor], **options: Any) -> None:
    """Gradient against autograd, H v against central differences of it."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient() -> Tensor:
        found = torch.autograd.grad(value(), parameters, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g.to_dense()).flatten()
                for g, p in zip(found, parameters, strict=True)
            ]
        )

    objective = Objective(model, batch, loss, **options)
    assert objective.loss() == pytest.approx(value().item(), abs=1e-12)
    torch.testing.assert_close(objective.gradient(), gradient(), rtol=1e-10, atol=1e-12)
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(2)).double()
    objective.gauss_newton() @ v
    expected = derivative_along(parameters, torch.enable_grad()(gradient), v)
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)


def _loss(loss: Any, targets: Tensor | None = None, **options: Any) -> Callable[[], None]:
    def run() -> None:
        (x, y), model = minibatch(N), mlp()
        y = y if targets is None else targets
        own = loss if callable(loss) else F.cross_entropy
        known = y if y.is_floating_point() else y.long()
        _check(model, (x, y), loss, lambda: own(model(x), known), **options)

    return run


def _model(f: Callable[..., Any], *more: Any, loss: Any = F.cross_entropy, **parts: Any) -> Callable[[], None]:
    def run() -> None:
        (x, y), model = minibatch(N), _head(f, **parts)
        _check(model, ((x, *more), y), loss, lambda: loss(model(x, *more), y))

    return run


def _penalised(held: bool) -> None:
    (x, y), model = minibatch(N), mlp()
    parameters = list(model.parameters())

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in (parameters if held else model.parameters()))

    _check(model, (x, y), loss, lambda: loss(model(x), y))


def _overwritten() -> None:
    (x, y), model = minibatch(N), mlp()
    H = Objective(model, (x, y)).hessian()
    H @ torch.ones(43).double()
    x.mul_(2)
    H @ torch.ones(43).double()


def _added() -> None:
    (x, y), model = minibatch(N), mlp()
    objective = Objective(model, (x, y))
    model.append(nn.Linear(3, 3).double())
    objective.loss()


def _exchanged() -> None:
    (x, y), model = minibatch(N), mlp()
    objective = Objective(model, (x, y))
    model[0] = nn.Linear(4, 5).double()
    assert objective.loss() == F.cross_entropy(model(x), y).item()


def _copied() -> None:
    model = mlp()
    operator = Objective(model, minibatch(N)).hessian()
    product = operator @ torch.ones(43).double()
    copied = pickle.loads(pickle.dumps(operator))
    model[0].weight.data.mul_(2)
    operator.refresh()
    torch.testing.assert_close(copied @ torch.ones(43).double(), product)


def _copied_penalty() -> None:
    model = mlp()
    copy.deepcopy(Objective(model, minibatch(N), lambda z, y: F.cross_entropy(z, y) + model[0].weight.square().sum()))


def _keeping() -> None:
    (x, y), model, calls, scale = minibatch(N), mlp(), [], 1.0

    def loss(z: Tensor, y: Tensor) -> Tensor:
        nonlocal scale
        scale *= 2
        calls.append(len(y))
        return scale * F.cross_entropy(z, y)

    _check(model, (x, y), loss, lambda: 2 * F.cross_entropy(model(x), y))
    assert not calls


def _writers() -> None:
    (x, _), model = minibatch(N), _head(lambda s, x: s.h(x.mul_(2)))
    y = torch.randn(N, 3).double()
    _check(
        model,
        (x, y),
        lambda z, y: (z - y.mul_(2)).square().mean(),
        lambda: (s := (model.h(2 * x) - 2 * y)).mul(s).mean(),
    )


def _looks_at_parameters() -> None:
    p = nn.Parameter(torch.rand(3))
    p.doubled = True  # type: ignore[attr-defined]
    _model(lambda s, x: s.h(x) * (2 * s.p if isinstance(s.p, nn.Parameter) and hasattr(s.p, "doubled") else 1), p=p)()


def _boxes(z: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([(a - t["boxes"]).square().sum() for a, t in zip(z, targets, strict=True)]).sum() / len(targets)


def _detection() -> None:
    (x, _), model = minibatch(N), mlp()
    targets = [{"boxes": torch.randn(1 + i % 3, 3).double()} for i in range(N)]
    batches = [(x, targets), (x[:5], targets[:5])]
    parts = [(n / (N + 5), b) for n, b in zip((N, 5), batches, strict=True)]
    _check(model, batches, _boxes, lambda: torch.stack([w * _boxes(model(x), t) for w, (x, t) in parts]).sum())


def _unequal() -> None:
    (x, y), model = minibatch(N), _head(lambda s, a, x: s.h(x) * a.sum())
    parts = [((torch.ones(3), x[:n]), (torch.ones(3).double(), y[:n])) for n in (N, 5)]
    Objective(model, parts, lambda z, y: F.cross_entropy(z, y[1], y[0]))


def _time_first() -> None:
    model = Fn(lambda s, x: s.h(s.rnn(x)[0]), rnn=nn.RNN(4, 4), h=nn.Linear(4, 3)).double()
    parts = [(torch.randn(6, n, 4).double(), torch.randint(3, (6, n))) for n in (9, 5)]
    Objective(model, parts, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))


def _nested() -> None:
    model = _head(lambda s, x: torch.stack([s.h(t).tanh().mean(0) for t in x.unbind()]))
    x = torch.nested.nested_tensor([torch.randn(1 + i % 3, 4).double() for i in range(N)], layout=torch.jagged)
    y = minibatch(N)[1]
    _check(model, (x, y), F.cross_entropy, lambda: F.cross_entropy(model(x), y))


def _complex() -> None:
    Objective(_head(lambda s, x: s.h(x), w=nn.Parameter(torch.zeros(2, dtype=torch.complex128))), minibatch(N))


def _compiled() -> None:
    (x, y), model = minibatch(N), mlp()
    _check(torch.compile(model, backend="aot_eager"), (x, y), "cross_entropy", lambda: F.cross_entropy(model(x), y))


def _mapping() -> None:
    (x, y), model = minibatch(N), _head(lambda s, x: {"logits": s.h(x), "hidden": x})
    _check(model, [{"x": x, "labels": y}], "cross_entropy", lambda: F.cross_entropy(model(x)["logits"], y))


def _list() -> None:
    model = _head(lambda s, x: F.linear(x, *s.ws))
    model.ws = list(model.parameters())
    Objective(model, minibatch(N)).gradient()


def _shared() -> None:
    (x, y), model = minibatch(N), _head(lambda s, x: s.h(torch.tanh(s.b(x))), a=nn.Linear(4, 4))
    model.b = model.a
    _check(model, (x, y), "cross_entropy", lambda: F.cross_entropy(model(x), y))
    assert isinstance(model.b.weight, nn.Parameter)


SOFT = torch.randn(N, 3, generator=torch.Generator().manual_seed(3)).double().softmax(1)
IGNORED = torch.where(torch.arange(N) % 3 == 0, -100, minibatch(N)[1])


def _counted() -> None:
    def f(s: nn.Module, x: Tensor) -> Tensor:
        s.notes["calls"] += 1
        s.notes["log"].append(x)
        return s.h(x)

    model = _head(f)
    model.notes = {"calls": 0, "log": []}
    objective = Objective(model, minibatch(N))
    objective.hessian() @ objective.gradient()
    assert model.notes == {"calls": 0, "log": []}


def _unseen() -> None:
    model = _head(lambda s, x: s.h(s.held[1](s.held[0](x))))
    model.held = [norm := nn.BatchNorm1d(4).double(), nn.Dropout(0.5)]
    x, y = minibatch(N)
    objective, plain = (
        Objective(m, (z, y), batch_norm="running") for m, z in ((model, x), (model.h, x / (1 + 1e-5) ** 0.5))
    )
    torch.testing.assert_close(objective.gradient(), plain.gradient())
    v = objective.gradient()
    torch.testing.assert_close(objective.hessian() @ v, plain.hessian() @ v)
    assert norm.training
    assert not norm.running_mean.any()


def _slope(s: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return s.h(torch.autograd.grad(torch.tanh(s.c(z[:, None])).sum(), z, create_graph=True)[0])


def _clipped() -> None:
    def f(s: nn.Module, x: Tensor) -> Tensor:
        z = s.h(x)
        if z.requires_grad:
            z.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return z

    Objective(_head(f), minibatch(N)).gauss_newton() @ torch.ones(15).double()


def _among_many() -> None:
    """More in test_cutting.py."""
    (x, y), model = (
        (t.repeat(10, *[1] * (t.ndim - 1)) for t in minibatch(N)),
        _head(lambda s, x: s.h(x - x[:100].mean(0))),
    )
    _check(model, (x, y), "cross_entropy", lambda: F.cross_entropy(model(x), y))
    assert len(Objective(model, (x, y)).batches) == 1


SITUATIONS: dict[str, Callable[[], Any]] = {
    "class weights": _loss(nn.CrossEntropyLoss(WEIGHT), microbatch=7),
    "class weights inside a callable": _loss(lambda z, y: F.cross_entropy(z, y, WEIGHT)),
    "class weights inside a callable, `microbatch=` asked for": _loss(
        lambda z, y: F.cross_entropy(z, y, WEIGHT), microbatch=7
    ),
    "ignored labels": _loss(nn.CrossEntropyLoss(), IGNORED, microbatch=7),
    "class probabilities as targets": _loss(nn.CrossEntropyLoss(), SOFT, microbatch=7),
    "uint8 or int32 labels": _loss("cross_entropy", minibatch(N)[1].to(torch.uint8)),
    "a loss over pairs of examples": _loss(lambda z, y: F.cross_entropy(z, y) + torch.pdist(z).mean()),
    '`reduction="none"`': _loss(nn.CrossEntropyLoss(reduction="none")),
    "a penalty on `model.parameters()` in the loss": lambda: _penalised(False),
    "a penalty on a list of parameters made before": lambda: _penalised(True),
    "a loss that keeps statistics, counters or a log: a module, an object, variables around a function": _keeping,
    "statistics that the model computes itself": _model(lambda s, x: s.h(x - x.mean(0))),
    "an edge list beside node features": _model(
        lambda s, x, e: s.h(x.index_add(0, e[1], x[e[0]])), torch.randint(N, (2, 90))
    ),
    "experts that take so many examples each, normalisation in groups of 64, a queue": _among_many,
    "a memory bank as long as the batch": _model(
        lambda s, x, b: s.h((x @ b.T).softmax(1) @ b), torch.randn(N, 4).double()
    ),
    "lengths in a list beside the tensors": _model(
        lambda s, x, n: s.h(torch.stack([row[:k].sum() * row for row, k in zip(x, n, strict=True)])),
        [1 + i % 4 for i in range(N)],
    ),
    "examples sorted inside the model, and put back": _model(
        lambda s, x: s.h(x[x[:, 0].argsort()])[x[:, 0].argsort().argsort()]
    ),
    "one module under two names": _shared,
    "parameters read from a plain list": _list,
    "layers in a plain list": _unseen,
    "counters, sums and logs in dictionaries and lists": _counted,
    "a model that differentiates inside `forward`": _model(_slope, c=nn.Conv1d(1, 2, 3)),
    "a backward pass that is not linear (a hook that clips)": _clipped,
    "weight normalisation": _model(lambda s, x: s.h(s.w(x)), w=parametrizations.weight_norm(nn.Linear(4, 4))),
    "activation checkpoints": _model(
        lambda s, x: s.h(checkpoint(torch.tanh, s.w(x), use_reentrant=False)), w=nn.Linear(4, 4)
    ),
    "embeddings with sparse gradients": _model(
        lambda s, x: s.h(s.e((x[:, 0] > 0).long())), e=nn.Embedding(2, 4, sparse=True)
    ),
    "a model that writes into its inputs, a loss that writes into its targets": _writers,
    "a forward that looks at the types or attributes of its parameters": _looks_at_parameters,
    "an activation changed in place that its derivative needs": _model(
        lambda s, x: s.h(x).sigmoid().mul_(2).sigmoid_().mul_(2)
    ),
    "a batch overwritten between two products": _overwritten,
    "a list of targets, one mapping an example (boxes)": _detection,
    "nested tensors, packed sequences": _nested,
    "batches of several sizes with shared tensors among inputs and targets": _unequal,
    "batches of several sizes with time along the first dimension": _time_first,
    "complex parameters": _complex,
    "a model under `torch.compile`": _compiled,
    "outputs in a mapping, batches in a mapping": _mapping,
    "outputs in a tuple, loss by name": lambda: Objective(_head(lambda s, x: (s.h(x), x)), minibatch(N)).loss(),
    "outputs in a tuple, loss a callable": _model(lambda s, x: (s.h(x), x), loss=lambda o, y: F.cross_entropy(o[0], y)),
    "a batch of three tensors": lambda: Objective(mlp(), [(*minibatch(N), minibatch(N)[1])]),
    "one example without a batch dimension": lambda: Objective(mlp(), (minibatch(N)[0][0], minibatch(N)[1][0])),
    "a layer added, frozen or let loose after the objective was made": _added,
    "a layer exchanged for another one of its size": _exchanged,
    "a copy of an operator, by `copy`, `pickle` or `torch.save`": _copied,
    "a copy of an objective whose loss reads the model by a variable": _copied_penalty,
    "a function that can be differentiated once": lambda: (
        Objective(_head(lambda s, x: OnceTanh.apply(s.h(x))), minibatch(N)).hessian() @ torch.ones(15).double()
    ),
    "a backward pass that autograd cannot differentiate: in NumPy, by a kernel, a solve in a hook": lambda: Objective(
        _head(lambda s, x: IN_NUMPY(s.h(x))), minibatch(N)
    ).hessian(),
    "a model that draws random numbers": lambda: Objective(
        _head(lambda s, x: s.h(x + torch.rand(4))), minibatch(N)
    ).hessian(),
    "class gradients split where examples interact": lambda: class_gradients(
        _head(lambda s, x: s.h(x - x.mean(0))), *minibatch(N), 3, algorithm="split"
    ),
}


def _rows() -> dict[str, str]:
    table = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if re.match(r"\| (?!situation|---)", line)]
    return {situation.strip(): outcome.strip() for situation, outcome in table}


def test_page_and_trials_name_the_same_situations():
    assert list(_rows()) == list(SITUATIONS)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situation(situation):
    outcome = _rows()[situation]
    torch.manual_seed(0)
    if outcome.startswith("right"):
        SITUATIONS[situation]()
        return
    kind, message = re.fullmatch(r"`(\w+)`: (.*)", outcome).groups()
    with pytest.raises(
        {"ValueError": ValueError, "RuntimeError": RuntimeError, "TypeError": TypeError}[kind]
    ) as caught:
        SITUATIONS[situation]()
    assert message.strip("“”") in str(caught.value)
    assert "\n" not in str(caught.value)
