"""Examples that act on one another later, after a switch or at other parameters: noticed before the next cut."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import LossScanner, Objective, class_gradients
from curvspace.curvature import independence
from curvspace.curvature.class_batches import splits_exactly
from curvspace.curvature.class_gradients import split_pass
from curvspace.optim import class_gradient_newton
from tests.unit.small_networks import mlp, sorted_minibatch


class Centring(nn.Module):
    """Subtracts the batch's mean once one of many things says so."""

    on_class = False

    def __init__(self):
        super().__init__()
        self.h, self.middle = nn.Linear(4, 3), nn.Identity()
        self.on, self.config, self.inner = False, SimpleNamespace(modes={"centre": [0]}), lambda z: z
        self.tensor = torch.tensor(False)
        self.register_buffer("buffer", torch.tensor(False))
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x, on=False):
        z = torch.tanh(self.inner(self.middle(self.h(x))))
        switches = (on, self.on, self.on_class, self.config.modes["centre"][0], self.tensor, self.buffer, self.frozen)
        return z - z.mean(0) if any(bool(s) for s in switches) else z


class Centre(nn.Module):
    def forward(self, z):
        return z - z.mean(0)


SWITCHES = {
    "attribute": lambda m: setattr(m, "on", True),
    "in a configuration": lambda m: m.config.modes["centre"].__setitem__(0, 1),
    "function": lambda m: setattr(m, "inner", lambda z: z - z.mean(0)),
    "plain tensor": lambda m: setattr(m, "tensor", torch.tensor(True)),
    "plain tensor in place": lambda m: m.tensor.fill_(True),
    "array": lambda m: m.config.modes["centre"].fill(1),
    "buffer": lambda m: m.buffer.fill_(True),
    "constant parameter": lambda m: m.frozen.fill_(1.0),
    "submodule": lambda m: setattr(m, "middle", Centre()),
    "hook": lambda m: m.middle.register_forward_hook(lambda module, x, z: z - z.mean(0)),
    "class": lambda m: setattr(type(m), "on_class", True),
    "forward of its own": lambda m: setattr(m, "forward", lambda x: (z := torch.tanh(m.h(x))) - z.mean(0)),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_a_switch_that_lets_examples_interact_is_noticed(switch):
    torch.manual_seed(0)
    model, (x, y) = type("Own", (Centring,), {})().double(), sorted_minibatch()
    if switch is SWITCHES["array"]:  # of which it cannot be told whether it has changed
        model.config.modes["centre"] = np.zeros(1)
    assert splits_exactly(model, x, y)
    cut = Objective(model, (x, y), microbatch=70)
    assert cut.loss() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-12)
    with torch.no_grad():
        switch(model)
    assert not splits_exactly(model, x, y)
    slow, _ = class_gradients(model, x, y, 3, algorithm="vjp")
    torch.testing.assert_close(class_gradients(model, x, y, 3)[0], slow, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="would change the function"):
        Objective(model, (x, y), microbatch=70).loss()
    assert Objective(model, (x, y)).loss() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-12)


@pytest.mark.parametrize(("off", "on"), [(False, True), (0, 1), (torch.tensor(0), torch.tensor(1)), ([], [1])])
def test_a_switch_among_the_inputs(off, on):
    torch.manual_seed(0)
    model, (x, y) = Centring().double(), sorted_minibatch()
    for switch, alone in ((off, True), (on, False), (off, True)):
        assert splits_exactly(model, (x, switch), y) == alone
        assert splits_exactly(model, {"x": x, "on": switch}, y) == alone


def test_what_stays_the_same_is_tried_once(monkeypatch):
    torch.manual_seed(0)
    model, (x, y) = Centring().double(), sorted_minibatch()
    model.forward = lambda x: model.h(x)
    assert splits_exactly(model, x, y)
    monkeypatch.setattr(independence, "_tried", lambda *_: pytest.fail("tried again"))
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert splits_exactly(model, x[3:90], y[3:90])


def test_running_statistics_that_training_moves_are_no_reason_to_try_again(monkeypatch):
    tried = []
    monkeypatch.setattr(independence, "_tried", lambda *_, once=independence._tried: tried.append(1) or once(*_))
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    optimizer = class_gradient_newton(model, num_classes=3, lr=0.01, batch_norm="running")
    for _ in range(4):
        optimizer.step(torch.randn(20, 4), torch.arange(20) % 3)
    assert int(model[1].num_batches_tracked) > 0
    assert len(tried) == 1


def _hinge(z, y):
    return F.cross_entropy(z, y) + 10 * torch.relu(z.mean(0).abs().max() - 1.5)


def _spread(z, y):
    return F.cross_entropy(z, y) + torch.relu(z.var(0, correction=0).max() - 1.5)


def _grown(model):
    model[2].weight.mul_(5)
    model[2].bias.add_(torch.tensor([0.0, 1.0, 3.0]).double())


def _grown_without_versions(model):
    model[2].weight.data.mul_(5)
    model[2].bias.data.add_(torch.tensor([0.0, 1.0, 3.0]).double())


@pytest.mark.parametrize("grow", [_grown, _grown_without_versions])
@pytest.mark.parametrize("loss", [_hinge, _spread])
def test_a_loss_that_adds_up_at_some_parameters_only(loss, grow):
    torch.manual_seed(0)
    model, (x, y) = mlp(), sorted_minibatch()
    objective = Objective(model, (x, y), loss, microbatch=64)
    assert len(objective.batches) == 5
    assert objective.loss() == pytest.approx(loss(model(x), y).item(), abs=1e-12)
    operators = [objective.hessian(), objective.gauss_newton(), objective.hessian_by_differences()]
    fisher = objective.empirical_fisher()
    with torch.no_grad():
        grow(model)
    for use in (objective.loss, objective.gradient, objective.hessian, *(H.refresh for H in operators)):
        with pytest.raises(ValueError, match="microbatch=64 would change the function"):
            use()
    with pytest.raises(ValueError, match="treat examples one by one"):
        fisher.refresh()


@pytest.mark.parametrize("loss", [_hinge, _spread])
def test_the_automatic_cut_ends_where_the_loss_no_longer_adds_up(loss, monkeypatch):
    monkeypatch.setattr("curvspace.objective.cache_friendly_size", lambda *_: 64)
    torch.manual_seed(0)
    model, (x, y) = mlp(), sorted_minibatch()
    objective, v = Objective(model, (x, y), loss), torch.randn(43).double()
    H = objective.hessian()
    assert len(H.batches) == 5
    with torch.no_grad():
        _grown(model)
    assert objective.loss() == pytest.approx(loss(model(x), y).item(), abs=1e-12)
    expected = torch.autograd.grad(loss(model(x), y), list(model.parameters()), create_graph=True)
    torch.testing.assert_close(objective.gradient(), torch.cat([g.flatten() for g in expected]).detach())
    product = torch.autograd.grad(torch.cat([g.flatten() for g in expected]) @ v, list(model.parameters()))
    H.refresh()
    torch.testing.assert_close(H @ v, torch.cat([h.flatten() for h in product]))
    with torch.no_grad():
        model[2].weight.div_(50)
        model[2].bias.zero_()
    assert len(objective.batches) == 5


def test_cuts_are_tried_once_for_the_same_parameters(monkeypatch):
    torch.manual_seed(0)
    model, (x, y) = mlp(), sorted_minibatch()
    objective = Objective(
        model, (x, y), lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean(), microbatch=64
    )
    known = Objective(model, (x, y), microbatch=64)
    assert len(objective.batches) == len(known.batches) == 5
    monkeypatch.setattr("curvspace.objective.cut", lambda *_: pytest.fail("tried again"))
    objective.loss(), objective.gradient(), objective.hessian().refresh()
    with torch.no_grad():
        _grown(model)
    known.loss(), known.gradient(), known.hessian().refresh()


@pytest.mark.parametrize("loss", [_hinge, _spread])
def test_a_scan_goes_where_the_loss_no_longer_adds_up(loss):
    torch.manual_seed(0)
    model, (x, y) = mlp(), sorted_minibatch()
    scanner = LossScanner(Objective(model, (x, y), loss, microbatch=64))
    there = copy.deepcopy(model)
    with torch.no_grad():
        _grown(there)
    theta, other = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, there))
    expected = [loss(m(x), y).item() for m in (model, there)]
    assert scanner.along(other - theta, [0.0, 1.0]) == pytest.approx(expected, abs=1e-12)


class OverTime(nn.Module):
    """As many times as examples; ``time_first`` says which comes first."""

    def __init__(self):
        super().__init__()
        self.inner, self.head, self.time_first = nn.Linear(4, 6), nn.Linear(6, 3), False

    def forward(self, x):
        if self.time_first:
            return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))
        return self.head(torch.tanh(self.inner(x)).mean(1))


def test_another_layout_inside_is_noticed_layer_by_layer():
    """Both are right one by one; what a layer keeps first is no longer the examples."""
    torch.manual_seed(0)
    model, x, y = OverTime().double(), torch.randn(8, 8, 4, dtype=torch.float64), torch.arange(8) % 3
    for time_first in (False, True, False):
        model.time_first = time_first
        slow, _ = class_gradients(model, x, y, 3, algorithm="vjp")
        torch.testing.assert_close(class_gradients(model, x, y, 3)[0], slow, rtol=0, atol=1e-12)
        torch.testing.assert_close(split_pass(model, x, y, 3).class_gradients, slow, rtol=0, atol=1e-12)


CLOSED = {
    "scalar": lambda s, h: h + s.gate * (h - h.mean(0)),
    "rectified": lambda s, h: h + s.gate.relu() * (h - h.mean(0)),
    "channels": lambda s, h: h + s.scales * (h - h.mean(0)),
    "matrix": lambda s, h: h + (h - h.mean(0)) @ s.low_rank,
    "one minus": lambda s, h: s.carry * h + (1 - s.carry) * h.mean(0),
    "attention": lambda s, h: h + (h @ h.T).softmax(1) @ h @ s.low_rank,
}


class Gated(nn.Module):
    """Examples act on one another through a gate that is closed, and outputs come from a head of zeros."""

    def __init__(self, name):
        super().__init__()
        self.inner, self.head, self.mix = nn.Linear(4, 5), nn.Linear(5, 3), CLOSED[name]
        self.gate, self.carry = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        self.scales, self.low_rank = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5, 5))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.mix(self, torch.tanh(self.inner(x))))


@pytest.mark.parametrize("name", CLOSED)
def test_a_gate_that_is_closed_at_first(name):
    torch.manual_seed(0)
    model, (x, y) = Gated(name).double(), sorted_minibatch(40)
    assert not splits_exactly(model, x, y)
    with pytest.raises(ValueError, match="would change the function"):
        Objective(model, (x, y), microbatch=10).hessian()
    for _ in range(2):
        slow, _ = class_gradients(model, x, y, 3, algorithm="vjp")
        torch.testing.assert_close(class_gradients(model, x, y, 3)[0], slow, rtol=0, atol=1e-12)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))


class Positive(nn.Module):
    """Defined at some parameters only, and one by one there."""

    def __init__(self, strict):
        super().__init__()
        self.inner, self.rate, self.shift = (
            nn.Linear(4, 3),
            nn.Parameter(torch.full((3,), 0.1)),
            nn.Parameter(-torch.ones(3)),
        )
        self.strict = strict

    def forward(self, x):
        if self.strict and not torch.equal(self.shift, -torch.ones_like(self.shift)):
            raise ValueError("made for these only")
        return self.inner(x) * self.rate.sqrt() + (-self.shift).log() + (0.1 - self.rate + 1e-9).log()


@pytest.mark.parametrize("strict", [False, True])
def test_parameters_elsewhere_at_which_a_model_is_undefined_teach_nothing(strict):
    torch.manual_seed(0)
    assert splits_exactly(Positive(strict).double(), *sorted_minibatch(40))


class _Spread:
    """Of all outputs together a term that is switched on later."""

    share = 0.0

    def __call__(self, z, y):
        p = z.softmax(1).mean(0)
        return F.cross_entropy(z, y) + self.share * (p * p.log()).sum()


class _SpreadModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("share", torch.zeros(()))

    def forward(self, z, y):
        p = z.softmax(1).mean(0)
        return F.cross_entropy(z, y) + self.share * (p * p.log()).sum()


def _of_a_global(z, y):
    p = z.softmax(1).mean(0)
    return F.cross_entropy(z, y) + SHARE * (p * p.log()).sum()


SHARE = 0.0


@pytest.mark.parametrize("kind", ["object", "function with one", "buffer", "global"])
def test_a_loss_that_joins_examples_later_is_noticed(kind, monkeypatch):
    term = _SpreadModule() if kind == "buffer" else _Spread()
    loss = {"function with one": lambda z, y: term(z, y), "global": _of_a_global}.get(kind, term)
    model, (x, y) = mlp(), sorted_minibatch(40)
    objective = Objective(model, (x, y), loss, microbatch=10)
    assert objective.loss() == pytest.approx(loss(model(x), y).item())
    if kind == "buffer":
        term.share.fill_(1)
    term.share = term.share if kind == "buffer" else 1.0
    monkeypatch.setitem(globals(), "SHARE", 1.0)
    with pytest.raises(ValueError, match="would change the function"):
        objective.loss()
