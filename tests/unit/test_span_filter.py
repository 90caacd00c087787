"""SpanFilter against dense projections in float64: what is taken out, averaged, and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvspace.functional import flatten, parameter_vector
from curvspace.optim import FirstOrder, build
from curvspace.optim.span_filter import SpanFilter
from tests.unit.dense_spans import (
    KINDS,
    backward,
    conv_network,
    dense_class_gradients,
    dense_means,
    gradients,
    images,
    projector,
    sgd,
)
from tests.unit.small_networks import C, Fn, batches, small_network


@pytest.mark.parametrize("spans", [KINDS[:1], KINDS[1:2], KINDS[:2], KINDS[1::-1], KINDS[:3]], ids=str)
def test_every_span_is_taken_out_by_its_dense_projector(spans: tuple) -> None:
    model = conv_network()
    optimizer = sgd(model)
    span = SpanFilter(optimizer, model, C, spans=spans, refresh_every=1, gamma=0.0, fraction=1.0, past_updates=2)
    past: list[Tensor] = []
    for x, y in images(4):
        before = parameter_vector(model)
        backward(model, x, y)
        g = gradients(model)
        parts = {
            "mean-directions": [dense_means(model)],
            "class-gradients": [dense_class_gradients(model, x, y)],
            "past-updates": [torch.stack(past[-2:], 1)] if past else [],
        }
        columns = torch.cat([c for kind in spans for c in parts[kind]], 1)
        columns = columns / columns.norm(dim=0)
        span.filter(x, y)
        expected = g - projector(columns) @ g
        torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-9)
        optimizer.step()
        past.append(before - parameter_vector(model))


def test_random_directions_take_out_as_many_dimensions_as_there_are_classes() -> None:
    model = conv_network()
    span = SpanFilter(sgd(model), model, C, spans=["random-directions"], refresh_every=2)
    bases = []
    for x, y in images(3):
        backward(model, x, y)
        g = gradients(model)
        span.filter()
        Q = span.span.matrix()
        torch.testing.assert_close(Q.T @ Q, torch.eye(C, dtype=torch.float64), rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients(model), g - Q @ (Q.T @ g), rtol=0, atol=1e-10)
        bases.append(Q)
    assert torch.equal(bases[0], bases[1])
    assert not torch.allclose(bases[1], bases[2])


def test_class_gradients_are_averaged_over_refreshes_and_taken_on_the_first_part() -> None:
    model = conv_network(norm=False)
    span = SpanFilter(sgd(model, lr=0.0), model, C, refresh_every=2, gamma=0.5, fraction=0.5)
    average, P = 0.0, None
    for step, (x, y) in enumerate(images(6)):
        y[:4] = torch.arange(4)  # every class in the first half
        backward(model, x, y)
        g = gradients(model)
        if step % 2 == 0:
            average = 0.5 * average + 0.5 * dense_class_gradients(model, x[:12], y[:12])
            P = projector(average)
        span.filter(x, y)
        torch.testing.assert_close(gradients(model), g - P @ g, rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.8])
@pytest.mark.parametrize("spans", [("mean-directions",), ("class-gradients",), ("mean-directions", "class-gradients")])
def test_gain_and_running_mean(spans: tuple, beta: float) -> None:
    """The running mean is corrected for its start, and projected when the span moves."""
    model = conv_network()
    span = SpanFilter(sgd(model, lr=0.0), model, C, spans=spans, gain=0.3, beta=beta, refresh_every=3, gamma=0.0)
    total, weight, P = 0.0, 0.0, None
    for step, (x, y) in enumerate(images(8)):
        backward(model, x, y)
        g = gradients(model)
        if step % 3 == 0:
            means, classes = dense_means(model), dense_class_gradients(model, x[:12], y[:12])
            chosen = {"mean-directions": means, "class-gradients": classes}
            P = projector(torch.cat([chosen[kind] / chosen[kind].norm(dim=0) for kind in spans], 1))
            total = P @ total if step else 0.0
        total, weight = beta * total + (1 - beta) * P @ g, beta * weight + (1 - beta)
        span.filter(x, y)
        torch.testing.assert_close(gradients(model), g - P @ g + 0.3 * total / weight, rtol=0, atol=1e-9)


def test_the_pass_for_class_gradients_leaves_statistics_modes_and_draws_alone() -> None:
    torch.manual_seed(0)
    model, twin = (nn.Sequential(*conv_network(), nn.Dropout(0.3)) for _ in range(2))
    model.train()
    span = SpanFilter(sgd(model), model, C, refresh_every=1)
    x, y = images(1)[0]
    torch.manual_seed(5)
    backward(model, x, y)
    state = torch.get_rng_state()
    span.filter(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    backward(twin, x, y)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("broken", [0, 2])
def test_a_broken_minibatch_at_a_refresh_is_not_in_the_means(broken: int) -> None:
    """The class gradients are dense averages over the others, and the next steps are finite."""
    torch.manual_seed(0)
    model = nn.Linear(5, C).double()
    optimizer = sgd(model, lr=0.0)
    span = SpanFilter(optimizer, model, C, refresh_every=1, gamma=0.5, fraction=1.0)
    averages = torch.zeros(C, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for step, (x, y) in enumerate(batches(4)):
        if step == broken:
            x = x.index_fill(0, torch.tensor(0), torch.inf)
        else:
            averages[y.unique()] = 0.5 * averages[y.unique()] + 0.5 * dense_class_gradients(model, x, y).T
        backward(model, x, y)
        span.filter(x, y)
        torch.testing.assert_close(span.bases["class-gradients"].state["average"], averages)
    assert torch.isfinite(gradients(model)).all()


def test_parameters_that_are_not_the_optimisers_or_have_no_gradient_are_left_alone() -> None:
    model = conv_network(norm=False)
    head = model[3]
    span = SpanFilter(torch.optim.SGD(head.parameters(), lr=0.1), model, C, gamma=0.0, fraction=1.0)
    x, y = images(1)[0]
    backward(model, x, y)
    features, g = model[0].weight.grad.clone(), flatten(p.grad for p in head.parameters())
    span.filter(x, y)
    assert torch.equal(model[0].weight.grad, features)
    columns = dense_class_gradients(model, x, y)[-len(g) :]
    torch.testing.assert_close(
        flatten(p.grad for p in head.parameters()), g - projector(columns) @ g, rtol=0, atol=1e-9
    )
    model.zero_grad()
    loose = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    model.register_parameter("loose", loose)
    span = SpanFilter(torch.optim.SGD(model.parameters(), lr=0.1), model, C, spans=KINDS[:2])
    span.step(x, y)
    assert loose.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": ()}, "spans must be one or several"),
        ({"spans": ("class_gradients",)}, "class-gradients"),
        ({"spans": ("mean-directions",) * 2}, "each once"),
        ({"gain": 1.5}, "gain must be in"),
        ({"beta": 1.0}, "beta must be in"),
        ({"refresh_every": 0}, "refresh_every must be at least 1"),
        ({"fraction": 0.0}, "fraction must be in"),
        ({"gamma": 1.0}, "gamma must be in"),
        ({"past_updates": 0, "spans": ("past-updates",)}, "past_updates must be at least 1"),
        ({"past_updates": 2.5, "spans": ("past-updates",)}, "past_updates must be an integer, got 2.5"),
        ({"refresh_every": 2.5}, "refresh_every must be an integer, got 2.5"),
        ({"refresh_every": True}, "refresh_every must be an integer, got True"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"gain": "0.1"}, "gain must be a number, got '0.1'"),
        ({"beta": None}, "beta must be a number"),
        ({"spans": ("random-directions",), "num_classes": None}, "num_classes must be given"),
    ],
)
def test_bad_values_are_named(options: dict, message: str) -> None:
    model = conv_network()
    with pytest.raises(ValueError, match=message):
        SpanFilter(sgd(model), model, **{"num_classes": C, **options})


def test_misuse_is_named() -> None:
    model, other = conv_network(), conv_network()
    with pytest.raises(ValueError, match="not its class"):
        SpanFilter(torch.optim.SGD, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds parameters of the model"):
        SpanFilter(sgd(other), model)
    span = SpanFilter(sgd(model), model)
    x, y = images(1)[0]
    backward(model, x, y)
    with pytest.raises(ValueError, match=r"call filter\(inputs, targets\)"):
        span.filter()
    SpanFilter(sgd(other), other, C).filter(x, y)  # without a gradient there is nothing to filter
    with pytest.raises(ValueError, match=r"step\(inputs, targets\) needs the targets"):
        span.step(x)
    with pytest.raises(ValueError, match="integer targets"):
        span.filter(x, nn.functional.one_hot(y, C).double())
    with pytest.raises(ValueError, match="does not step from"):
        build("span-filter", {"base": {"kind": "curveball"}}, model, C, lr=1.0)
    with pytest.raises(ValueError, match="base needs the kind of"):
        build("span-filter", {"base": {}}, model, C, lr=1.0)
    with pytest.raises(ValueError, match="gains"):
        build("span-filter", {"base": {"kind": "sgd"}, "gains": 1}, model, C, lr=1.0)
    assert isinstance(build("span-filter", {"base": {"kind": "sgd"}}, model, C, lr=1.0), FirstOrder)


def by_rule(rule: Callable[..., Any]) -> nn.Module:
    """A linear layer with a rule of its own for several inputs."""
    torch.manual_seed(3)
    return Fn(lambda s, *x, **named: rule(s.inner, *x, **named), inner=nn.Linear(5, C).double())


def messages(inner, x, edges):
    return inner(x).index_add(0, edges[1], inner(x)[edges[0]])


EDGES = torch.stack([torch.arange(24), torch.arange(24).flip(0)])
MASK = torch.full((6, 6), 0.5, dtype=torch.float64)
INPUTS = {
    "mask first": (lambda inner, mask, x: inner(x * mask.mean()), lambda x: (MASK, x), (0.5, 1.0)),
    "positions first": (
        lambda inner, position_ids, x: inner(x + position_ids.double().mean()),
        lambda x: {"position_ids": torch.arange(4)[None], "x": x},
        (0.5, 1.0),
    ),
    "edges first": (lambda inner, edges, x: messages(inner, x, edges), lambda x: (EDGES, x), (1.0,)),
    "edges last": (messages, lambda x: (x, EDGES), (1.0,)),
    "a mapping of outputs": (lambda inner, x: {"logits": inner(x)}, lambda x: x, (0.5, 1.0)),
}


@pytest.mark.parametrize("num_classes", [None, C])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_and_outputs_in_other_forms(name: str, num_classes: int | None) -> None:
    """Against class gradients of the first examples by autograd, one class at a time."""
    rule, form, fractions = INPUTS[name]
    x, y = batches(1)[0]
    for fraction in fractions:
        model = by_rule(rule)
        span = SpanFilter(sgd(model), model, num_classes, gamma=0.0, fraction=fraction)

        def outputs(rows: Tensor, model: nn.Module = model) -> Tensor:
            inputs = form(rows)
            if isinstance(inputs, dict):
                z = model(**inputs)
            else:
                z = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            return z["logits"] if isinstance(z, dict) else z

        n = round(fraction * len(y))
        z, parameters = outputs(x[:n]), list(model.parameters())
        rows = [
            flatten(torch.autograd.grad(z[y[:n] == k, k].mean(), parameters, retain_graph=True))
            for k in y[:n].unique().tolist()
        ]
        model.zero_grad()
        nn.functional.cross_entropy(outputs(x), y).backward()
        g = gradients(model)
        span.filter(form(x), y)
        torch.testing.assert_close(gradients(model), g - projector(torch.stack(rows, 1)) @ g, rtol=0, atol=1e-9)


MIXING = {
    "edges": (messages, lambda x: (x, EDGES)),
    "edges first": (lambda inner, edges, x: messages(inner, x, edges), lambda x: (EDGES, x)),
    "a mean": (lambda inner, x: inner(x - x.mean(0)), lambda x: x),
}


@pytest.mark.parametrize(("rule", "form"), MIXING.values(), ids=MIXING.keys())
def test_a_part_of_examples_that_the_model_mixes_is_refused(rule, form) -> None:
    x, y = batches(1)[0]
    model = by_rule(rule)
    with pytest.raises(ValueError, match="does not treat examples one by one; use fraction=1"):
        SpanFilter(sgd(model), model, C).step(form(x), y)
    SpanFilter(sgd(model), model, C, fraction=1.0).step(form(x), y)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda inner, x: {"a": inner(x), "b": inner(x)}, "a dict without one tensor or .logits"),
        (lambda inner, x: inner(x)[:, 0], r"shape \(24,\); class gradients need \(N, C\)"),
    ],
)
def test_outputs_that_are_no_logits_are_named(rule, message) -> None:
    model = by_rule(rule)
    with pytest.raises(ValueError, match=message):
        SpanFilter(sgd(model), model).filter(*batches(1)[0])


def test_targets_of_another_number_are_named() -> None:
    x, y = batches(1)[0]
    model = small_network()
    with pytest.raises(ValueError, match="a batch of 24 inputs has 23 targets"):
        SpanFilter(sgd(model), model, C).filter(x, y[1:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    x, y = batches(1)[0]
    filtered = []
    for labels in (y, y.to(dtype)):
        model = small_network()
        span = SpanFilter(sgd(model), model, C)
        backward(model, x, y)
        span.filter(x, labels)
        filtered.append(gradients(model))
    assert torch.equal(*filtered)
