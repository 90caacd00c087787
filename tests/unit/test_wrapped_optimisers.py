"""A ready optimiser and what is wrapped around it: one state, one rate, groups, copies, gradient norms."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace.functional import parameter_vector
from curvspace.optim import FirstOrder, NegativeCurvature, SpanFilter, build
from tests.unit.small_networks import C, batches, deep_network, small_network


def test_a_ready_optimiser_of_another_model_is_refused() -> None:
    model = deep_network()
    for held in (deep_network(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="holds parameters of the model"):
            FirstOrder(model, torch.optim.SGD(held.parameters(), lr=0.1))
    FirstOrder(model, torch.optim.SGD([next(model.parameters()), *held.parameters()], lr=0.1))


WRAPPERS: dict[str, Callable[[torch.optim.Optimizer, nn.Module], FirstOrder]] = {
    "FirstOrder": lambda optimizer, model: FirstOrder(model, optimizer),
    "SpanFilter": lambda optimizer, model: SpanFilter(optimizer, model, C, spans="mean-directions"),
}
INNER = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.1}, "RMSprop": {"lr": 0.1, "momentum": 0.5}}


def one_state(wrapper: FirstOrder) -> None:
    assert wrapper.param_groups is wrapper.inner.param_groups
    assert wrapper.state is wrapper.inner.state
    saved, inner = wrapper.state_dict(), wrapper.inner.state_dict()
    assert saved["param_groups"] == inner["param_groups"]
    for key, entries in inner["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(saved["state"][key][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("loaded", ["wrapped", "wrapper"])
@pytest.mark.parametrize("scheduled", ["wrapped", "wrapper"])
def test_a_schedule_of_either_object_moves_the_rate_after_either_is_loaded(
    scheduled: str, loaded: str, wrap: str, kind: str
) -> None:
    """Schedulers made before and after; torch's optimiser alone, loaded and scheduled alike, takes the same rates."""
    model = small_network()
    inner = getattr(torch.optim, kind)(model.parameters(), **INNER[kind])
    wrapper = WRAPPERS[wrap](inner, model)
    objects = {"wrapped": inner, "wrapper": wrapper}
    x, y = batches(1)[0]
    before = torch.optim.lr_scheduler.StepLR(objects[scheduled], 1, gamma=0.5)
    wrapper.step(x, y)
    saved = copy.deepcopy(objects[loaded].state_dict())
    momentum = copy.deepcopy(inner.state_dict()["state"])
    wrapper.step(x, y)
    objects[loaded].load_state_dict(saved)
    one_state(wrapper)
    for key, entries in momentum.items():
        for name, value in entries.items():
            torch.testing.assert_close(wrapper.state_dict()["state"][key][name], value, rtol=0, atol=0)
    before.step()
    assert inner.param_groups[0]["lr"] == wrapper.param_groups[0]["lr"] == 0.05
    after = torch.optim.lr_scheduler.StepLR(objects[scheduled], 1, gamma=0.1)
    wrapper.step(x, y)
    after.step()
    assert inner.param_groups[0]["lr"] == wrapper.param_groups[0]["lr"] == pytest.approx(0.005)
    start = parameter_vector(model)
    inner.param_groups[0]["lr"] = 0.0
    wrapper.step(x, y)
    assert torch.equal(parameter_vector(model), start)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_groups_are_added_and_copied_with_the_wrapped_optimiser(wrap: str, way: str) -> None:
    model = small_network()
    wrapper = WRAPPERS[wrap](torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), model)
    wrapper.add_param_group({"params": [model[2].weight], "lr": 0.2})
    wrapper.inner.add_param_group({"params": [model[2].bias], "lr": 0.3})
    assert [g["lr"] for g in wrapper.param_groups] == [0.1, 0.2, 0.3]
    one_state(wrapper)
    x, y = batches(1)[0]
    wrapper.step(x, y)
    twin = pickle.loads(pickle.dumps(wrapper)) if way == "pickle" else copy.deepcopy(wrapper)
    one_state(twin)
    twin.inner.load_state_dict(copy.deepcopy(wrapper.inner.state_dict()))
    one_state(twin)
    assert twin.param_groups is not wrapper.param_groups
    twin.param_groups[0]["lr"] = 0.0
    assert wrapper.param_groups[0]["lr"] == wrapper.inner.param_groups[0]["lr"] == 0.1
    twin.param_groups[0]["lr"] = 0.1
    assert torch.equal(twin.step(x, y), wrapper.step(x, y))
    assert torch.equal(parameter_vector(twin.model), parameter_vector(model))


@pytest.mark.parametrize("part", ["head", "body", "all", "two optimisers"])
def test_the_norm_is_of_this_minibatch_and_of_what_the_optimiser_holds(part: str) -> None:
    """Against torch.autograd.grad, step after step; the ``grad`` of other parameters is as it was."""
    model = small_network()
    held = {"head": [model[2]], "body": [model[0]], "all": [model], "two optimisers": [model[2]]}[part]
    own = [p for module in held for p in module.parameters()]
    optimizer = FirstOrder(model, torch.optim.SGD(own, lr=0.1))
    second = FirstOrder(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    others = [p for p in model.parameters() if not any(p is q for q in own)]
    for i, p in enumerate(others):
        p.grad = torch.full_like(p, 2.0) if i % 2 else None
    for x, y in batches(3):
        expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), own)
        present = [None if p.grad is None else p.grad.clone() for p in others]
        optimizer.step(x, y)
        torch.testing.assert_close(optimizer.grad_norm, torch.cat([g.flatten() for g in expected]).norm())
        for p, g in zip(own, expected, strict=True):
            torch.testing.assert_close(p.grad, g)
        for p, g in zip(others, present, strict=True):
            assert (p.grad is None) == (g is None)
            assert g is None or torch.equal(p.grad, g)
        if part == "two optimisers":
            first = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model[0].parameters()))
            second.step(x, y)
            torch.testing.assert_close(second.grad_norm, torch.cat([g.flatten() for g in first]).norm())


def test_the_norm_is_zero_where_the_loss_does_not_depend_on_what_is_held() -> None:
    model = small_network()
    model.register_parameter("loose", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer = FirstOrder(model, torch.optim.SGD([model.loose], lr=0.1))
    optimizer.step(*batches(1)[0])
    assert float(optimizer.grad_norm) == 0
    assert torch.equal(model.loose, torch.ones(3, dtype=torch.float64))


class Slowing(torch.optim.SGD):
    """Keeps a number beside state and param groups, as schedules inside of optimisers do."""

    def __init__(self, params, lr: float, momentum: float = 0.9):
        super().__init__(params, lr=lr, momentum=momentum)
        self.taken = 0

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1 / (1 + self.taken)
        self.taken += 1
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.taken = state_dict["taken"]


class Around(torch.optim.Optimizer):
    """Around another optimiser: every third step goes back half of the way."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.taken = optimizer, 0
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def step(self, closure=None):
        self.optimizer.step(closure)
        self.taken += 1
        if self.taken % 3 == 0:
            with torch.no_grad():
                for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                    p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self):
        return {"inside": self.optimizer.state_dict(), "slow": self.slow, "taken": self.taken}

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict["inside"])
        self.slow, self.taken = state_dict["slow"], state_dict["taken"]


OWN_STATES: dict[str, Callable[[nn.Module], FirstOrder]] = {
    "a number": lambda m: FirstOrder(m, Slowing, lr=0.1),
    "another optimiser": lambda m: FirstOrder(m, Around(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))),
    "filtered": lambda m: SpanFilter(Slowing(m.parameters(), lr=0.1), m, C, refresh_every=2),
    "negative curvature": lambda m: NegativeCurvature(m, Slowing, lr=0.1),
    "Lookahead": lambda m: FirstOrder(
        m,
        pytest.importorskip("pytorch_optimizer").Lookahead(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), k=3),
    ),
    "LBFGS": lambda m: FirstOrder(m, torch.optim.LBFGS, lr=0.1, max_iter=3),
    "SOAP": lambda m: (
        pytest.importorskip("pytorch_optimizer")
        and build("pytorch_optimizer:SOAP", {"precondition_frequency": 2}, m, C, lr=0.01)
    ),
}


@pytest.mark.parametrize("way", ["file", "memory", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", OWN_STATES)
def test_what_an_optimiser_keeps_beside_torchs_state_goes_with_it(name: str, way: str) -> None:
    if name == "Lookahead" and way in ("deepcopy", "pickle"):
        pytest.skip("the class itself cannot be copied")
    steps, model = batches(9, dtype=torch.float32), deep_network()
    optimizer = OWN_STATES[name](model)
    for x, y in steps[:4]:
        optimizer.step(x, y)
    if way in ("deepcopy", "pickle"):
        resumed = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        other = resumed.model
    else:
        saved = (copy.deepcopy(model.state_dict()), optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other = deep_network()
        resumed = OWN_STATES[name](other)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
    for x, y in steps[4:]:
        assert torch.equal(optimizer.step(x, y), resumed.step(x, y))
    assert torch.equal(parameter_vector(model), parameter_vector(other))


def test_a_state_of_another_wrapped_optimiser_is_refused() -> None:
    """Adam's state fits AdamW, whose decay would no longer be decoupled."""
    adam, adamw = (FirstOrder(deep_network(), kind, lr=0.1) for kind in (torch.optim.Adam, torch.optim.AdamW))
    with pytest.raises(ValueError, match="its wrapped = 'Adam', here 'AdamW'"):
        adamw.load_state_dict(adam.state_dict())


def test_parameters_let_loose_are_moved_where_the_optimiser_holds_them() -> None:
    ours, plain = deep_network(), deep_network()
    for model in (ours, plain):
        model[0].requires_grad_(False)
        model[2].requires_grad_(False)
    optimizer = FirstOrder(ours, torch.optim.SGD([*ours[2:].parameters()], lr=0.1, momentum=0.9))
    reference = torch.optim.SGD([*plain[2:].parameters()], lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(batches(6, dtype=torch.float32)):
        for model, opt in ((ours, optimizer), (plain, reference)):
            if step == 2:
                model[2].requires_grad_(True)
            if step == 4:
                model[0].requires_grad_(True)
                opt.add_param_group({"params": [*model[0].parameters()], "lr": 0.05})
        optimizer.step(x, y)
        reference.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        reference.step()
    assert torch.equal(parameter_vector(ours), parameter_vector(plain))


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"line_search_fn": "strong_wolfe"}])
def test_evaluations_of_one_step_under_autocast_see_the_weights_that_have_moved(options: dict) -> None:
    """As torch's own does with a closure that enters autocast, which keeps casts of the weights until its end."""
    x, y = (t.float() if t.is_floating_point() else t for t in batches(1)[0])
    model, plain = deep_network(), deep_network()
    wrapper = FirstOrder(model, torch.optim.LBFGS, max_iter=5, **options)
    reference = torch.optim.LBFGS(plain.parameters(), max_iter=5, **options)

    def closure() -> Tensor:
        reference.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(plain(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrapper.step(x, y)
        assert float(loss) == float(reference.step(closure).detach())
    assert torch.equal(parameter_vector(model), parameter_vector(plain))
