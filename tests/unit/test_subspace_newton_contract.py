"""SubspaceNewton keeps the contract of torch's optimisers: reloads, schedulers, costs, bad values."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

from curvspace.functional import flatten, parameter_vector
from curvspace.optim import (
    Adam,
    ClassGradients,
    CurveBall,
    DiagonalNewton,
    Drop,
    FirstOrder,
    GradientDescent,
    NegativeCurvature,
    PastUpdates,
    RandomDirections,
    RayleighRitzNewton,
    Scale,
    SpanFilter,
    SubspaceNewton,
    bsfa,
    bulk_sgd,
    class_gradient_newton,
    dominant_sgd,
    fosi,
    gradient_centralisation,
    low_rank_newton,
    rayleigh_ritz_newton,
)
from tests.unit.small_networks import C, D, batches, linear_softmax, small_network

SPANS = ("class-gradients", "past-updates", "mean-directions")
CONFIGURATIONS = {
    "paper A": lambda m: class_gradient_newton(m, C, damping=0.1),
    "ours": lambda m: rayleigh_ritz_newton(m, C, refresh_every=2, curvature_gamma=0.5),
    "adaptive": lambda m: rayleigh_ritz_newton(m, C, damping="adaptive", past_updates=2, cospace="adam", lr=0.01),
    "past updates, every step": lambda m: rayleigh_ritz_newton(m, C, past_updates=2, refresh_every=1),
    "class gradients dropped": lambda m: bulk_sgd(m, C, momentum=0.9, span="class-gradients", refresh_every=3),
    "low rank": lambda m: low_rank_newton(m, C, refresh_every=2, damping=0.1),
    "dominant": lambda m: dominant_sgd(m, C, momentum=0.5, refresh_every=3),
    "random": lambda m: SubspaceNewton(m, RandomDirections(3, redraw=True), Scale(0.1), GradientDescent(0.1, 0.5)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_reload_continues_bit_for_bit(name: str, tmp_path) -> None:
    data = [(x.float(), y) for x, y in batches(9)]
    model = small_network(dtype=torch.float32)
    optimizer = CONFIGURATIONS[name](model)
    for x, y in data[:5]:
        optimizer.step(x, y)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for x, y in data[5:]:
        optimizer.step(x, y)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = small_network(seed=7, dtype=torch.float32)
    again = CONFIGURATIONS[name](other)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for x, y in data[5:]:
        again.step(x, y)
    assert torch.equal(parameter_vector(model), parameter_vector(other))
    assert again.costs.products == optimizer.costs.products


REWOUND = {
    **CONFIGURATIONS,
    "updates before the first refresh": lambda m: bsfa(m, 1, window=3, refresh_every=2),
    "refreshed late": lambda m: fosi(m, 2, smallest=1, warmup=3, refresh_every=4),
    "refreshed late, Adam": lambda m: fosi(m, 2, warmup=3, refresh_every=4, cospace="adam"),
    "centred": lambda m: gradient_centralisation(m),
    "filtered": lambda m: SpanFilter(torch.optim.SGD(m.parameters(), 0.1), m, C, gain=0.3, beta=0.5, spans=SPANS),
    "filtered LBFGS": lambda m: SpanFilter(torch.optim.LBFGS(m.parameters(), 0.1, 2), m, C, spans="past-updates"),
}


@pytest.mark.parametrize("name", REWOUND)
def test_a_state_from_before_the_first_refresh_goes_into_an_optimiser_with_a_span(name: str) -> None:
    data, before = batches(5), 1 if "refresh" in name else 0
    model = small_network()
    optimizer = REWOUND[name](model)
    for x, y in data[:before]:
        optimizer.step(x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    first = [float(optimizer.step(x, y)) for x, y in data[before:]]
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert [float(optimizer.step(x, y)) for x, y in data[before:]] == first


OTHERS = {
    "fewer directions": lambda m: low_rank_newton(m, 2),
    "another basis": lambda m: class_gradient_newton(m, C),
    "another rule": lambda m: bulk_sgd(m, 3),
    "another shape": lambda m: low_rank_newton(linear_softmax(), 3),
    "another type": lambda m: low_rank_newton(m.float(), 3),
    "torch's own": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "wrapped": lambda m: SpanFilter(torch.optim.SGD(m.parameters(), lr=0.1), m, C),
}


@pytest.mark.parametrize("name", OTHERS)
def test_states_of_other_optimisers_are_refused(name: str) -> None:
    optimizer = low_rank_newton(small_network(), 3)
    with pytest.raises(ValueError, match=r"this state dict is of another optimiser|this is no state dict of"):
        optimizer.load_state_dict(OTHERS[name](small_network()).state_dict())


def test_states_of_other_spans_are_refused_and_older_states_are_taken() -> None:
    model = small_network()
    one, other = (SpanFilter(torch.optim.SGD(model.parameters()), model, C, spans=s) for s in (SPANS[:1], SPANS[:2]))
    saved = one.state_dict()
    with pytest.raises(ValueError, match="its spans"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match="lacks 'costs'"):
        one.load_state_dict(one.inner.state_dict())
    optimizer = rayleigh_ritz_newton(model, C, lr=0.2, cospace="adam")
    saved = optimizer.state_dict()
    del saved["made_of"]
    for name in ("built_lr", "betas"):
        del saved["param_groups"][0][name]
    optimizer.load_state_dict(saved)
    assert {**optimizer.defaults, "params": None} == {**optimizer.param_groups[0], "params": None}


@pytest.mark.parametrize("name", ["paper A", "ours", "low rank", "CurveBall", "negative curvature"])
def test_a_model_that_is_cast_after_steps_is_refused(name: str) -> None:
    makers = {**CONFIGURATIONS, "CurveBall": CurveBall, "negative curvature": NegativeCurvature}
    model = small_network(dtype=torch.float32)
    optimizer = makers[name](model)
    x, y = batches(1)[0]
    optimizer.step(x.float(), y)
    model.double()
    with pytest.raises(ValueError, match=r"are torch.float64 on cpu now, but .* steps on torch.float32"):
        optimizer.step(x, y)


def plateau(optimizer: torch.optim.Optimizer) -> None:
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    schedule.step(1.0)
    schedule.step(1.0)


def by_hand(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 0.3


MOVED = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.4, total_steps=20),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.4),
    "plateau": plateau,
    "by hand": by_hand,
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("schedule", MOVED)
@pytest.mark.parametrize("rule", ["diagonal", "Rayleigh-Ritz"])
def test_the_newton_step_is_relative_to_the_rate_of_the_start(rule: str, schedule: str) -> None:
    """Without a rule outside of the span the step is the rate's factor times that of an optimiser left alone."""
    diagonal = functools.partial(DiagonalNewton, estimate="gauss-newton", damping=0.1)
    inside = {"diagonal": diagonal, "Rayleigh-Ritz": RayleighRitzNewton}
    x, y = batches(1)[0]
    steps, rates = [], []
    for move in (lambda o: None, MOVED[schedule]):
        model = small_network()
        optimizer = SubspaceNewton(model, ClassGradients(orthonormal=True), inside[rule](), Drop(0.1))
        move(optimizer)
        again = SubspaceNewton(model, ClassGradients(orthonormal=True), inside[rule](), Drop(0.7))
        again.load_state_dict(optimizer.state_dict())  # with the rate that it was built with
        rates.append(again.param_groups[0]["lr"])
        start = parameter_vector(model)
        again.step(x, y)
        steps.append(parameter_vector(model) - start)
    assert rates[0] == 0.1 != rates[1]
    torch.testing.assert_close(steps[1], rates[1] / 0.1 * steps[0], rtol=1e-9, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("cospace", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["ours", "fosi"])
def test_a_schedule_of_the_momentum_reaches_every_part(kind: str, cospace: str) -> None:
    """As an optimiser that was built with the momentum that the schedule begins with."""
    makers = {
        "ours": lambda m, mu: rayleigh_ritz_newton(m, C, 0.01, mu, cospace=cospace),
        "fosi": lambda m, mu: fosi(m, 2, 0.01, mu, warmup=1, cospace=cospace),
    }
    ends = []
    for built, scheduled in ((0.9, True), (0.6, False)):
        model = small_network()
        optimizer = makers[kind](model, built)
        if scheduled:
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.25, total_steps=20, base_momentum=0.5, max_momentum=0.6, div_factor=25.0
            )
        for x, y in batches(4):
            optimizer.step(x, y)
        ends.append(parameter_vector(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)


def test_state_dict_is_a_snapshot() -> None:
    optimizer = class_gradient_newton(small_network(), C, damping=0.1)
    first, second = batches(2)
    optimizer.step(*first)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["extra"])
    optimizer.step(*second)
    assert torch.equal(saved["extra"]["basis"]["average"], kept["basis"]["average"])
    assert torch.equal(saved["extra"]["buffer"], kept["buffer"])


SNAPSHOTS = {
    "CurveBall": lambda m: CurveBall(m),
    "SGD": lambda m: FirstOrder(m, torch.optim.SGD, lr=0.1, momentum=0.9),
    "LBFGS": lambda m: FirstOrder(m, torch.optim.LBFGS, lr=0.1, max_iter=3),
    "filtered": lambda m: SpanFilter(torch.optim.Adam(m.parameters(), 0.01), m, C, refresh_every=2),
    "negative curvature": lambda m: NegativeCurvature(m, torch.optim.Adam, lr=0.01, every=2),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_state_in_memory_can_be_returned_to_and_shared(name: str) -> None:
    """The momenta that torch keeps are changed in place: neither the saved state nor another optimiser has them."""
    data, model, other = batches(6), small_network(), small_network()
    optimizer, again = SNAPSHOTS[name](model), SNAPSHOTS[name](other)
    for x, y in data[:3]:
        optimizer.step(x, y)
    weights, saved = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    first = [float(optimizer.step(x, y)) for x, y in data[3:]]
    model.load_state_dict(weights)
    other.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    again.load_state_dict(saved)
    losses = [(float(optimizer.step(x, y)), float(again.step(x, y))) for x, y in data[3:]]
    assert losses == [(loss, loss) for loss in first]


def test_learning_rate_scheduler_acts_on_the_cospace() -> None:
    x, y = batches(1)[0]
    model = small_network()
    optimizer = SubspaceNewton(model, RandomDirections(2), Drop(), GradientDescent(0.4))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    lengths = []
    for _ in range(2):
        before = parameter_vector(model)
        g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))
        optimizer.step(x, y)
        scheduler.step()
        rest = optimizer.basis.span.reject(g)
        lengths.append(float((before - parameter_vector(model)).norm() / rest.norm()))
    assert lengths == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda m: class_gradient_newton(m, C, lr=-1.0), "lr.*-1.0"),
        (lambda m: class_gradient_newton(m, C, momentum=1.5), "momentum.*1.5"),
        (lambda m: class_gradient_newton(m, C, gamma=1.0), "gamma.*1.0"),
        (lambda m: class_gradient_newton(m, C, damping=-0.5), "damping.*-0.5"),
        (lambda m: class_gradient_newton(m, C, momentum_on="both"), "momentum_on.*both"),
        (lambda m: class_gradient_newton(m, C, initial="one"), "initial.*one"),
        (lambda m: class_gradient_newton(m, 0), "num_classes.*0"),
        (lambda m: rayleigh_ritz_newton(m, C, damping="fixed"), "damping.*fixed"),
        (lambda m: rayleigh_ritz_newton(m, C, scale=0.0), "scale.*0.0"),
        (lambda m: rayleigh_ritz_newton(m, C, fraction=2.0), "fraction.*2.0"),
        (lambda m: rayleigh_ritz_newton(m, C, refresh_every=0), "refresh_every.*0"),
        (lambda m: rayleigh_ritz_newton(m, C, cospace="adam", momentum_on="step"), "momentum_on"),
        (lambda m: low_rank_newton(m, 0), "k.*0"),
        (lambda m: low_rank_newton(m, 3, curvature="fisher"), "curvature.*fisher"),
        (lambda m: SubspaceNewton(m, PastUpdates(0), Drop(), Drop()), "k.*0"),
        (lambda m: SubspaceNewton(m, RandomDirections(2), Drop(), Adam(0.1, eps=0.0)), "eps.*0.0"),
    ],
)
def test_bad_values_are_named(build, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(linear_softmax())


def test_diagonal_newton_refuses_a_basis_without_estimates() -> None:
    optimizer = SubspaceNewton(linear_softmax(), RandomDirections(2), DiagonalNewton(), GradientDescent(0.1))
    with pytest.raises(ValueError, match="RayleighRitzNewton"):
        optimizer.step(*batches(1)[0])


def test_one_param_group_only() -> None:
    optimizer = class_gradient_newton(linear_softmax(), C)
    with pytest.raises(ValueError, match="one param group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_costs_are_counted() -> None:
    x, y = batches(1)[0]
    paper = class_gradient_newton(small_network(), C)
    paper.step(x, y)
    assert (paper.costs.forward, paper.costs.backward, paper.costs.products) == (1, 2, 0)
    ours = rayleigh_ritz_newton(small_network(), C, refresh_every=3, fraction=0.25)
    for _ in range(3):
        ours.step(x, y)
    assert ours.steps == 3
    assert ours.costs.forward == pytest.approx(3 + 0.25)
    assert ours.costs.backward == pytest.approx(4 + 0.25)
    assert ours.costs.jvp == ours.costs.products == pytest.approx(0.25 * C)
    assert ours.costs.seconds > 0


def test_batch_norm_by_batch_and_running_statistics() -> None:
    """Class gradients pass through the statistics that are asked for; either way the running
    statistics move once a step, as in plain training."""
    x, y = batches(1)[0]

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, C)).double()

    plain = network()
    plain(x)
    rows = {}
    for batch_norm in (None, "running"):
        model = network()
        basis = ClassGradients(0.0, num_classes=C, batch_norm=batch_norm)
        SubspaceNewton(model, basis, Scale(), GradientDescent(0.0)).step(x, y)
        torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)
        assert int(model[1].num_batches_tracked) == 1
        rows[batch_norm] = basis.averages()
    model = network()
    z = model(x)
    for k in range(C):
        expected = flatten(torch.autograd.grad(z[y == k, k].mean(), list(model.parameters()), retain_graph=True))
        torch.testing.assert_close(rows[None][k], expected, rtol=0, atol=1e-10)
    assert not torch.allclose(rows[None], rows["running"])


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_inputs_as_tuple_or_mapping(form: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear_softmax()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.inner(a + b)

    x, y = batches(1)[0]
    model, plain = Two(), linear_softmax()
    inputs = (x / 2, x / 2) if form == "tuple" else {"a": x / 2, "b": x / 2}
    loss = rayleigh_ritz_newton(model, C).step(inputs, y)
    torch.testing.assert_close(loss, rayleigh_ritz_newton(plain, C).step(x, y))
    torch.testing.assert_close(parameter_vector(model), parameter_vector(plain))


def test_a_diverged_run_gives_nan_and_no_crash() -> None:
    x, y = batches(1)[0]
    for name, build in CONFIGURATIONS.items():
        model = small_network()
        optimizer = build(model)
        optimizer.step(x, y)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        for _ in range(3):
            assert math.isnan(optimizer.step(x, y)), name
