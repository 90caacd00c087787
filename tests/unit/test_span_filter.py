"""SpanFilter against dense projections in float64, in the loops that its users write."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from small_networks import C, batches, small_network
from torch import Tensor, nn

from curvspace.functional import flatten, parameter_vector
from curvspace.optim import FirstOrder, build
from curvspace.optim.span_filter import SpanFilter

KINDS = ("mean-directions", "class-gradients", "past-updates", "random-directions")


def conv_network(norm: bool = True) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 3), *([nn.BatchNorm2d(3)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 9, C)).double()


def images(count: int, n: int = 24) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(n, 2, 5, 5, generator=g, dtype=torch.float64) + 0.5, torch.randint(0, C, (n,), generator=g))
        for _ in range(count)
    ]


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **options})


def gradients(model: nn.Module) -> Tensor:
    return flatten(p.grad for p in model.parameters() if p.grad is not None)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def dense_means(model: nn.Module) -> Tensor:
    parameters, columns = list(model.parameters()), []
    for i, p in enumerate(parameters):
        for unit in range(len(p) if p.ndim > 1 else 0):
            marked = [torch.zeros_like(q) for q in parameters]
            marked[i][unit] = 1 / marked[i][unit].numel() ** 0.5
            columns.append(flatten(marked))
    return torch.stack(columns, 1)


def dense_class_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Example by example in eval mode: (P, classes present)."""
    model.eval()
    columns = []
    for k in y.unique().tolist():
        members = [torch.autograd.grad(model(x[i : i + 1])[0, k], list(model.parameters())) for i in (y == k).nonzero()]
        columns.append(torch.stack([flatten(m) for m in members]).mean(0))
    model.train()
    return torch.stack(columns, 1)


def projector(columns: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    u = u[:, s > 1e-10 * s[0]]
    return u @ u.T


def test_every_span_is_taken_out_by_its_dense_projector() -> None:
    for spans in (KINDS[:1], KINDS[1:2], KINDS[:2], KINDS[1::-1], KINDS[:3]):
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
            torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-9, msg=str(spans))
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


def test_groups_that_are_added_to_the_wrapped_optimiser_are_filtered() -> None:
    for which in ("wrapper", "wrapped"):
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


class Function(nn.Module):
    """A linear layer with a rule of its own for several inputs."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.rule = nn.Linear(5, C).double(), rule

    def forward(self, *args, **kwargs):
        return self.rule(self.inner, *args, **kwargs)


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
        model = Function(rule)
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


def test_a_part_of_examples_that_the_model_mixes_is_refused() -> None:
    x, y = batches(1)[0]
    rules = {
        "edges": (messages, (x, EDGES)),
        "edges first": (lambda inner, edges, x: messages(inner, x, edges), (EDGES, x)),
        "a mean": (lambda inner, x: inner(x - x.mean(0)), x),
    }
    for rule, inputs in rules.values():
        model = Function(rule)
        with pytest.raises(ValueError, match="does not treat examples one by one; use fraction=1"):
            SpanFilter(sgd(model), model, C).step(inputs, y)
        SpanFilter(sgd(model), model, C, fraction=1.0).step(inputs, y)


def test_outputs_that_are_no_logits_are_named() -> None:
    x, y = batches(1)[0]
    for rule, message in (
        (lambda inner, x: {"a": inner(x), "b": inner(x)}, "a dict without one tensor or .logits"),
        (lambda inner, x: inner(x)[:, 0], r"shape \(24,\); class gradients need \(N, C\)"),
    ):
        model = Function(rule)
        with pytest.raises(ValueError, match=message):
            SpanFilter(sgd(model), model).filter(x, y)
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
