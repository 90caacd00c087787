"""SpanFilter in the loops of its users: schedules, clipping, scalers, closures, reloads, layers frozen or added."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from curvspace.functional import flatten, parameter_vector
from curvspace.optim import build
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
from tests.unit.small_networks import C, batches, small_network


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "NAdam", "RMSprop"])
def test_any_optimiser_goes_on_from_the_filtered_gradient_unprojected(kind: str) -> None:
    """The whole step equals the two lines, and both torch's optimiser on gradients centred by hand."""
    models = [conv_network() for _ in range(3)]
    optimizers = [getattr(torch.optim, kind)(m.parameters(), lr=0.01) for m in models]
    whole = SpanFilter(optimizers[0], models[0], spans="mean-directions")
    lines = SpanFilter(optimizers[1], models[1], spans=("mean-directions",))
    for x, y in images(4):
        loss = whole.step(x, y)
        assert torch.equal(loss, backward(models[1], x, y))
        lines.filter()
        optimizers[1].step()
        backward(models[2], x, y)
        for p in models[2].parameters():
            if p.ndim > 1:
                p.grad = p.grad - p.grad.flatten(1).mean(1).reshape(-1, *[1] * (p.ndim - 1))
        optimizers[2].step()
    assert torch.equal(parameter_vector(models[0]), parameter_vector(models[1]))
    torch.testing.assert_close(parameter_vector(models[0]), parameter_vector(models[2]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spans", [*[(kind,) for kind in KINDS], KINDS])
def test_a_reload_continues_bit_for_bit(spans: tuple) -> None:
    options = {"spans": list(spans), "gain": 0.2, "beta": 0.7, "refresh_every": 3, "past_updates": 2}
    data = images(11)
    model = conv_network().float()
    data = [(x.float(), y) for x, y in data]
    block = {"kind": "torch.optim:NAdam"}
    optimizer = build("span-filter", {"base": block, **options}, model, C, lr=0.01)
    for x, y in data[:5]:
        optimizer.step(x, y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = conv_network().float()
    resumed = build("span-filter", {"base": block, **options}, other, C, lr=0.01)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for x, y in data[5:]:
        assert torch.equal(optimizer.step(x, y), resumed.step(x, y))
    assert torch.equal(parameter_vector(model), parameter_vector(other))


def test_a_copy_goes_on_as_the_original_and_apart_from_it() -> None:
    model = conv_network()
    span = SpanFilter(sgd(model), model, C, spans=KINDS[:3], gain=0.2, beta=0.7, refresh_every=3)
    data = images(7)
    for x, y in data[:4]:
        span.step(x, y)
    start = parameter_vector(model)
    other = copy.deepcopy(span)
    for x, y in data[4:]:
        other.step(x, y)
    assert torch.equal(parameter_vector(model), start)
    for x, y in data[4:]:
        span.step(x, y)
    assert torch.equal(parameter_vector(model), parameter_vector(other.model))


def test_schedules_groups_clipping_and_accumulation() -> None:
    """A user's loop with all of them, against the same loop on gradients centred by hand."""

    def loop(filtered: bool) -> Tensor:
        model = conv_network()
        groups = [{"params": list(model[:3].parameters()), "lr": 0.05}, {"params": list(model[3:].parameters())}]
        optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=0.01)
        span = SpanFilter(optimizer, model, spans=("mean-directions",)) if filtered else None
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(span or optimizer, 4)
        for x, y in images(4):
            optimizer.zero_grad()
            for part in (slice(0, 12), slice(12, 24)):
                (nn.functional.cross_entropy(model(x[part]), y[part]) / 2).backward()
            if span is None:
                for p in model.parameters():
                    if p.ndim > 1:
                        p.grad -= p.grad.flatten(1).mean(1).reshape(-1, *[1] * (p.ndim - 1))
            else:
                span.filter(x, y)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step() if span is None else span.step()
            schedule.step()
        return parameter_vector(model)

    torch.testing.assert_close(loop(True), loop(False), rtol=0, atol=1e-10)


def test_with_a_gradient_scaler_an_overflow_is_skipped_and_leaves_no_trace() -> None:
    model = conv_network().float()
    optimizer = sgd(model)
    span = SpanFilter(optimizer, model, C, gain=0.5, beta=0.9, refresh_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, (x, y) in enumerate(images(5)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        if step == 2:
            model[0].weight.grad[0] = torch.inf
        scaler.unscale_(span)
        before = parameter_vector(model)
        span.filter(x.float(), y)
        scaler.step(span)
        scaler.update()
        assert torch.equal(parameter_vector(model), before) == (step == 2)
        assert torch.isfinite(span._mean["sum"]).all()
        assert torch.isfinite(parameter_vector(model)).all()


def test_freezing_layers_starts_the_span_anew() -> None:
    model = conv_network(norm=False)
    span = SpanFilter(sgd(model), model, C, refresh_every=5)
    data = images(4)
    for x, y in data[:2]:
        span.step(x, y)
    model[0].requires_grad_(False)
    for x, y in data[2:]:
        assert torch.isfinite(span.step(x, y))
    assert len(span.span.blocks[0].T) == sum(p.numel() for p in model[3].parameters())


def three_layers() -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, C)]
    return nn.Sequential(*layers).double().requires_grad_(False)


def let_loose(model: nn.Sequential, layers: tuple[int, ...]) -> None:
    for i in (0, 2, 4):
        model[i].requires_grad_(i in layers)


@pytest.mark.parametrize("between", ["nothing", "a reload", "a copy"])
@pytest.mark.parametrize("spans", [("class-gradients",), ("class-gradients", "past-updates"), KINDS[:3]])
@pytest.mark.parametrize("then", [(2,), (2, 4), "replaced"])
def test_other_parameters_of_as_many_numbers_start_the_span_anew(then: object, spans: tuple, between: str) -> None:
    """Frozen and let loose, or replaced by new ones, and as many numbers as before: equal to a new filter's gradient,
    with nothing left in the span of the class gradients of what is trained now."""
    options = {"spans": spans, "fraction": 1.0, "gain": 0.0, "refresh_every": 10}
    model = three_layers()
    let_loose(model, (0, 4) if then == (2, 4) else (0,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    span = SpanFilter(optimizer, model, C, **options)
    data = batches(3)
    for x, y in data[:2]:
        backward(model, x, y)
        span.filter(x, y)
        optimizer.step()
    if between == "a copy":
        span = copy.deepcopy(span)
        model = span.model
    if then == "replaced":
        model[0] = nn.Linear(5, 5).double()
        span.add_param_group({"params": list(model[0].parameters())})
    else:
        let_loose(model, then)
    if between == "a reload":
        saved = span.state_dict()
        span = SpanFilter(span.inner, model, C, **options)
        span.load_state_dict(saved)
    x, y = data[2]
    new = SpanFilter(span.inner, model, C, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for one in (span, new):
        backward(model, x, y)
        before = flatten(p.grad for p in trained)
        one.filter(x, y)
        results.append(flatten(p.grad for p in trained))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    rows = []
    for k in y.unique().tolist():
        own = model(x)[y == k, k].mean()
        rows.append(flatten(torch.autograd.grad(own, trained)))
    Q = torch.linalg.qr(torch.stack(rows, 1))[0]
    assert (Q.T @ before).norm() > 1e-2
    assert (Q.T @ results[0]).norm() < 1e-10


def test_a_span_is_kept_where_the_parameters_are_the_same() -> None:
    model = three_layers()
    let_loose(model, (0, 2, 4))
    span = SpanFilter(sgd(model), model, C, refresh_every=10)
    (x, y), (x2, y2) = batches(2)
    span.step(x, y)
    kept = span.span
    again = SpanFilter(sgd(model), model, C, refresh_every=10)
    again.load_state_dict(span.state_dict())
    for one in (span, again, copy.deepcopy(span)):
        one.step(x2, y2)
        torch.testing.assert_close(one.span.matrix(), kept.matrix(), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["wrapper", "wrapped"])
def test_groups_that_are_added_to_the_wrapped_optimiser_are_filtered(which: str) -> None:
    model = conv_network(norm=False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    span = SpanFilter(optimizer, model, C, gamma=0.0, fraction=1.0)
    x, y = images(1)[0]
    backward(model, x, y)
    span.filter(x, y)
    (span if which == "wrapper" else optimizer).add_param_group({"params": list(model[3].parameters())})
    backward(model, x, y)
    g = gradients(model)
    span.filter(x, y)
    P = projector(dense_class_gradients(model, x, y))
    torch.testing.assert_close(gradients(model), g - P @ g, rtol=0, atol=1e-9)


def test_closures_and_losses_of_ones_own() -> None:
    model = small_network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    span = SpanFilter(optimizer, model, spans=("mean-directions",), loss=lambda z, y: (z.softmax(1) ** 2).mean())
    start = parameter_vector(model)
    x, y = batches(1)[0]
    span.step(x, y)
    moved = parameter_vector(model) - start
    torch.testing.assert_close(dense_means(model).T @ moved, torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-12)
    assert moved.norm() > 0


@pytest.mark.parametrize("own", [False, True])
def test_of_several_evaluations_in_a_step_the_first_refreshes(own: bool) -> None:
    """Steps 0 and 3 of five; past updates are changes from step to step."""
    model, changes = small_network(), []
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    span = SpanFilter(optimizer, model, C, spans=("class-gradients", "past-updates"), refresh_every=3, past_updates=9)
    for x, y in batches(5):
        start = parameter_vector(model)
        if own:
            span.step(lambda x=x, y=y: (backward(model, x, y), span.filter(x, y))[0])
        else:
            span.step(x, y)
        changes.append(start - parameter_vector(model))
    state = span.bases["past-updates"].state
    assert span.bases["class-gradients"].state["times"].max() == 2
    assert state["recorded"] == 4
    torch.testing.assert_close(state["updates"][:4], torch.stack(changes[:4]))


@pytest.mark.filterwarnings("error")
def test_a_scheduler_of_the_filter_sees_the_steps_of_the_wrapped_optimiser() -> None:
    model = small_network()
    optimizer = sgd(model)
    span = SpanFilter(optimizer, model, C)
    schedule = torch.optim.lr_scheduler.StepLR(span, 1, gamma=0.5)
    for x, y in batches(2):
        backward(model, x, y)
        span.filter(x, y)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_a_model_that_is_cast_starts_the_span_anew() -> None:
    model = small_network(dtype=torch.float32)
    span = SpanFilter(sgd(model, momentum=0.0, nesterov=False), model, C, gain=0.5, beta=0.5)
    (x, y), (x2, y2) = batches(2)
    span.step(x.float(), y)
    model.double()
    span.step(x2, y2)
    assert span.bases["class-gradients"].state["times"].max() == 1
    assert span.bases["class-gradients"].state["average"].dtype == torch.float64
