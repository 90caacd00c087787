"""Batches are cut only where that leaves the function as it is; whatever is not cut is evaluated whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.batches import batch_flags, take
from curvspace.curvature import independence
from curvspace.curvature.class_batches import splits_exactly
from curvspace.curvature.class_gradients import split_pass, vjp_pass
from curvspace.curvature.independence import SAMPLE
from tests.unit.small_networks import Fn, mlp, sorted_minibatch

N = 300  # above the size from which a CPU cuts


def _wide() -> nn.Module:
    """Enough activations per example that the automatic rule cuts at 32."""
    return nn.Sequential(nn.Linear(4, 20_000), nn.Tanh(), nn.Linear(20_000, 3)).double()


def _pairs(z, y):
    half = len(z) // 2
    return F.cross_entropy(z, y) + (z[:half] - z[half : 2 * half]).square().sum(1).mean()


WEIGHT = torch.tensor([0.1, 1.0, 8.0]).double()
LOSSES = {
    "plain": (F.cross_entropy, True),
    "module": (nn.CrossEntropyLoss(WEIGHT), True),
    "ignored": (nn.CrossEntropyLoss(ignore_index=0), True),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), True),
    "weighted lambda": (lambda z, y: F.cross_entropy(z, y, WEIGHT), False),
    "separable lambda": (lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean(), True),
    "pairs": (_pairs, False),
    "spread": (lambda z, y: F.cross_entropy(z, y) + z.std(), False),
    "weights of each example": (lambda z, y: (F.cross_entropy(z, y, reduction="none") * torch.arange(N)).mean(), False),
}


@pytest.mark.parametrize(("loss", "cuttable"), LOSSES.values(), ids=LOSSES.keys())
def test_losses_that_may_be_cut_and_others(loss, cuttable):
    torch.manual_seed(0)
    model, (x, y) = mlp(), sorted_minibatch()
    value = loss(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
    v = torch.randn(len(gradient)).double()
    whole = Objective(model, (x, y), loss, microbatch=None)
    if not cuttable:
        with pytest.raises(ValueError, match="microbatch=64 would change the function"):
            Objective(model, (x, y), loss, microbatch=64).loss()
        return
    parts = Objective(model, (x, y), loss, microbatch=64)
    assert max(b.size for b in parts.batches) == 64
    for objective in (whole, parts):
        assert objective.loss() == pytest.approx(value.item(), abs=1e-12)
        torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-10, atol=1e-12)
    for kind in ("hessian", "gauss_newton"):
        torch.testing.assert_close(getattr(parts, kind)() @ v, getattr(whole, kind)() @ v, rtol=1e-10, atol=1e-12)


def test_the_automatic_size_cuts_only_what_may_be_cut():
    torch.manual_seed(0)
    model, batch = _wide(), sorted_minibatch()
    assert len(Objective(model, batch, nn.CrossEntropyLoss(WEIGHT)).batches) > 1
    objective = Objective(model, batch, lambda z, y: F.cross_entropy(z, y, WEIGHT))
    assert len(objective.batches) == 1
    assert objective.loss() == pytest.approx(F.cross_entropy(model(batch[0]), batch[1], WEIGHT).item(), abs=1e-12)


def _bank(s, x, bank):
    return s.h((x @ bank.T).softmax(1) @ bank)


MODELS = {
    "own statistics": (lambda s, x: s.h(x - x.mean(0)), ()),
    "gate that starts at zero": (lambda s, x: s.h(x) + s.gate * s.h(x).mean(0), ()),
    "neighbour": (lambda s, x: s.h(x + x.roll(1, 0)), ()),
    "edges": (lambda s, x, e: s.h(x.index_add(0, e[1], x[e[0]])), (torch.randint(N, (2, 900)),)),
    "bank as long as the batch": (_bank, (torch.randn(N, 4).double(),)),
    "longer bank": (_bank, (torch.randn(N + 9, 4).double(),)),
    "temperature": (lambda s, x, t: s.h(x) / t, (torch.tensor(2.0).double(),)),
    "permutation": (lambda s, x, p: s.h(x + x[p]), (torch.randperm(N),)),
    "mask as long as the sample": (lambda s, x, m: s.h(x.masked_fill(m[0, :4], 0.0)), (torch.eye(8).bool(),)),
}
TREATS_EXAMPLES_ALONE = {"longer bank", "temperature", "mask as long as the sample"}


@pytest.mark.parametrize(("name", "forward", "more"), [(n, *m) for n, m in MODELS.items()], ids=MODELS.keys())
def test_models_that_treat_examples_alone_and_others(name, forward, more):
    torch.manual_seed(0)
    x, y = sorted_minibatch()
    model = Fn(forward, h=nn.Linear(4, 3), gate=nn.Parameter(torch.zeros(()))).double()
    inputs = (x, *more)
    alone = name in TREATS_EXAMPLES_ALONE
    assert splits_exactly(model, inputs, y) == alone
    parameters = list(model.h.parameters())
    value = F.cross_entropy(model(*inputs), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
    objective = Objective(model, (inputs, y), parameters="h.*")
    assert objective.loss() == pytest.approx(value.item(), abs=1e-12)
    torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-10, atol=1e-12)
    objective.hessian(), objective.gauss_newton()
    if alone:
        parts = Objective(model, (inputs, y), parameters="h.*", microbatch=70)
        torch.testing.assert_close(parts.gradient(), gradient, rtol=1e-10, atol=1e-12)
        found = split_pass(model, inputs, y, 3)
        torch.testing.assert_close(found.gradient, vjp_pass(model, inputs, y, 3).gradient, rtol=1e-10, atol=1e-12)
    else:
        with pytest.raises(ValueError, match="would change the function"):
            Objective(model, (inputs, y), microbatch=70).gradient()
        with pytest.raises(ValueError, match='"split" is not exact'):
            class_gradients(model, inputs, y, 3, algorithm="split")
    slow, _ = class_gradients(model, inputs, y, 3, algorithm="vjp")
    torch.testing.assert_close(class_gradients(model, inputs, y, 3)[0], slow, rtol=0, atol=1e-12)


def test_the_user_says_which_inputs_are_the_batch():
    torch.manual_seed(0)
    x, y = sorted_minibatch()
    model = Fn(_bank, h=nn.Linear(4, 3)).double()
    inputs = (x, torch.randn(N, 4).double())
    value = F.cross_entropy(model(*inputs), y).item()
    stated = Objective(model, (inputs, y), batched=[0], microbatch=64)
    assert stated.loss() == pytest.approx(value, abs=1e-12)
    assert [b.size for b in stated.batches] == [64, 64, 64, 64, 44]
    assert splits_exactly(model, inputs, y, batched=[0])
    c, _ = class_gradients(model, inputs, y, 3, algorithm="split", batched=[0])
    torch.testing.assert_close(c, class_gradients(model, inputs, y, 3, algorithm="vjp")[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"batched names 2, but the inputs are \[0, 1\]"):
        Objective(model, (inputs, y), batched=[2])
    with pytest.raises(ValueError, match=r"batched names 1 of shape \(9, 4\), but there are 300 targets"):
        Objective(model, ((x, torch.zeros(9, 4)), y), batched=[1])


def test_flags_are_those_of_the_whole_batch():
    inputs = {"x": torch.arange(10.0), "mask": torch.ones(4, 4), "state": (torch.arange(10), torch.tensor(3.0))}
    flags = batch_flags(inputs, 10)
    assert flags == (True, False, True, False)
    part = take(take(inputs, slice(0, 4), flags), slice(0, 2), flags)  # the mask is as long as the first part
    assert part["mask"].shape == (4, 4)
    assert part["state"][0].tolist() == [0, 1]


def test_batches_of_labels_that_do_not_count():
    torch.manual_seed(0)
    model, (x, y) = mlp(), sorted_minibatch(40)
    loss = nn.CrossEntropyLoss(ignore_index=0)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]  # all of the first are ignored
    objective = Objective(model, batches, loss)
    assert objective.loss() == pytest.approx(loss(model(x), y).item(), abs=1e-12)
    with pytest.raises(ValueError, match="no target counts"):
        Objective(model, batches[:1], loss)


class RuledOut(nn.Module):
    """A class that no example may have."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).masked_fill(torch.arange(4) == 3, -torch.inf)


def test_a_class_that_is_ruled_out_is_no_reason_not_to_cut():
    torch.manual_seed(0)
    model, (x, y) = RuledOut().double(), sorted_minibatch()
    assert splits_exactly(model, x, y)
    whole, cut = Objective(model, (x, y)), Objective(model, (x, y), microbatch=7)
    v = torch.randn(20, dtype=torch.float64)
    assert cut.loss() == pytest.approx(whole.loss(), abs=1e-12)
    torch.testing.assert_close(cut.gradient(), whole.gradient(), rtol=0, atol=1e-12)
    torch.testing.assert_close(cut.hessian() @ v, whole.hessian() @ v, rtol=0, atol=1e-12)


def test_of_a_model_that_has_diverged_it_is_said_that_the_loss_is_nan():
    model, (x, y) = nn.Linear(4, 3).double(), sorted_minibatch()
    nn.init.constant_(model.weight, torch.nan)
    with pytest.raises(ValueError, match="the loss is nan"):
        Objective(model, (x, y), microbatch=7).gradient()


def _prior(z, y):
    p = z.softmax(1).mean(0)
    return F.cross_entropy(z, y) + (p * p.log()).sum()


def _parity(z, y):
    p = z.softmax(1)[:, 0]
    return F.cross_entropy(z, y) + 5 * (p[::2].mean() - p[1::2].mean()) ** 2


def _variance(z, y):
    return F.cross_entropy(z, y) + z.var(0).sum() ** 2


def _mean_outputs(z, y):
    return F.cross_entropy(z, y) + z.mean(0).square().sum()


@pytest.mark.parametrize("loss", [_prior, _parity, _variance, _mean_outputs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_whose_parts_agree_to_first_order_at_a_head_of_zeros(loss, dtype):
    torch.manual_seed(0)
    model, (x, y) = mlp().to(dtype), sorted_minibatch(40)
    x = x.to(dtype)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    assert Objective(model, (x, y), F.cross_entropy, microbatch=10).batches[0].size == 10
    with pytest.raises(ValueError, match="would change the function"):
        Objective(model, (x, y), loss, microbatch=10).hessian()


def test_a_loss_that_takes_probabilities_only_is_cut():
    """At other outputs it is still among those that it takes."""

    def likelihood(p, y):
        assert bool((p >= 0).all() and (p <= 1).all())
        return F.binary_cross_entropy(p, F.one_hot(y, 3).to(p))

    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(mlp(), nn.Softmax(1)), sorted_minibatch(40)
    assert len(Objective(model, (x, y), likelihood, microbatch=10).batches) == 4


def _until(s, x, lengths):
    return torch.stack([torch.tanh(s.h(row[:n])).mean(0) for row, n in zip(x, lengths, strict=False)])


LENGTHS = [6] * 10 + [1 + i % 5 for i in range(30)]
BESIDE = {
    "list": (lambda s, x, lengths: _until(s, x, lengths), LENGTHS),
    "tuple": (lambda s, x, lengths: _until(s, x, lengths), tuple(LENGTHS)),
    "array": (lambda s, x, lengths: _until(s, x, lengths), np.array(LENGTHS)),
    "strings": (lambda s, x, names: _until(s, x, map(len, names)), ["x" * n for n in LENGTHS]),
    "spans": (lambda s, x, spans: _until(s, x, [b for _, b in spans]), [(0, n) for n in LENGTHS]),
    "nested": (lambda s, x, more: _until(s, x, more["lengths"]), {"lengths": LENGTHS, "more": 1}),
}


@pytest.mark.parametrize(("forward", "lengths"), BESIDE.values(), ids=BESIDE.keys())
def test_what_is_said_of_each_example_beside_the_tensors(forward, lengths):
    torch.manual_seed(0)
    model, x, y = Fn(forward, h=nn.Linear(3, 3)).double(), torch.randn(40, 6, 3).double(), torch.arange(40) % 3
    inputs = (x, lengths)
    z = model(*inputs)
    rows = [torch.autograd.grad(z[y == k, k].mean(), list(model.parameters()), retain_graph=True) for k in range(3)]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(class_gradients(model, inputs, y, 3)[0], expected, rtol=0, atol=1e-12)
    assert Objective(model, (inputs, y)).loss() == pytest.approx(F.cross_entropy(z, y).item(), abs=1e-12)
    cut = Objective(model, (inputs, y), microbatch=10)
    if isinstance(lengths, np.ndarray):  # which an objective takes as a tensor
        assert cut.loss() == pytest.approx(F.cross_entropy(z, y).item(), abs=1e-12)
    else:
        with pytest.raises(ValueError, match="would change the function"):
            cut.loss()


def test_only_tensors_are_named_as_the_batch_and_what_is_no_example_does_not_matter():
    x, y = torch.randn(40, 6, 3).double(), torch.arange(40) % 3
    model = Fn(lambda s, x, *_: s.h(x).mean(1), h=nn.Linear(3, 3)).double()
    with pytest.raises(ValueError, match="batched names 1, which holds what is no tensor"):
        Objective(model, ((x, LENGTHS), y), batched=[0, 1])
    for more in ([2, 3], "a" * 40, [x] * 40, np.array(3), None):
        assert splits_exactly(model, (x, more), y)


def test_a_parameter_without_entries_lets_no_examples_interact() -> None:
    model = mlp()
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3).double()))
    assert splits_exactly(model, torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)


def _capacity(s, x):
    z, taken = s.h(x), torch.zeros(len(x), dtype=torch.bool)
    for expert in range(3):
        taken[(s.g(x).argmax(1) == expert).nonzero()[:60, 0]] = True
    return torch.where(taken[:, None], z, s.g(x))


def _groups(s, x):
    return s.h(torch.cat([part - part.mean(0) if len(part) > 8 else part for part in x.split(64)]))


def _queue(s, x):
    return s.h(x) + (s.g(x[:100]).mean(0) if len(x) > 100 else 0)


def _outlier(s, x):
    return s.h(x) * (1 + (x.abs().amax() > 6))


def _neighbours(s, x):
    return s.h(x) + s.g(torch.cat([torch.zeros_like(x[:64]), x[:-64]])[: len(x)])


# What passes between many examples, but not between eight
MANY = {f.__name__[1:]: f for f in (_capacity, _groups, _queue, _outlier, _neighbours)}


def _among_many(name):
    torch.manual_seed(0)
    x, y = sorted_minibatch()
    x[200] *= 10
    return Fn(MANY[name], h=nn.Linear(4, 3), g=nn.Linear(4, 3)).double(), x, y


@pytest.mark.parametrize("name", MANY)
def test_what_passes_between_many_examples_only(name, monkeypatch):
    monkeypatch.setattr("curvspace.objective.cache_friendly_size", lambda *_: 64)
    model, x, y = _among_many(name)
    objective = Objective(model, (x, y))
    assert objective.loss() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-12)
    assert [b.size for b in objective.batches] == [N]
    with pytest.raises(ValueError, match="microbatch=64 would change the function"):
        Objective(model, (x, y), microbatch=64).loss()


@pytest.mark.parametrize("name", MANY)
def test_class_gradients_of_what_passes_between_many_examples_only(name):
    model, x, y = _among_many(name)
    z = model(x)
    parameters = list(model.parameters())
    for k, found in enumerate(class_gradients(model, x, y, 3)[0]):
        expected = torch.autograd.grad(z[y == k, k].mean(), parameters, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]))
    with pytest.raises(ValueError, match="does not treat examples one by one"):
        class_gradients(model, x, y, 3, algorithm="split")


def test_as_many_examples_are_tried_as_memory_surely_holds(monkeypatch):
    sizes = []
    model, x, y = _among_many("queue")
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr(independence, "default_budget", lambda _: 5_000)
    assert Objective(model, (x, y), microbatch=64).batches
    assert SAMPLE < max(sizes) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_not_to_cut(dtype):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 500), nn.Tanh(), nn.Linear(500, 3)).to(dtype), sorted_minibatch()
    assert len(Objective(model, (x.to(dtype), y), microbatch=64).batches) == 5
