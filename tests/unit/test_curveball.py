"""CurveBall against a dense computation with explicit J, H_L and Ĝ, and the discipline around it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

from curvspace.functional import flatten, parameter_vector, trainable_parameters
from curvspace.losses import CrossEntropy, get_loss
from curvspace.optim.curveball import CurveBall, _solve_scaled


def network(kind: str, outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    if kind == "mlp":
        layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)]
    elif kind == "batchnorm":
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, outputs)]
    elif kind == "dropout":
        layers = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, outputs)]
    else:
        layers = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(2, outputs)]
    return nn.Sequential(*layers).double()


def batches(steps: int, loss: str, n: int = 12):
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        if loss == "mse":
            yield x, torch.randn(n, 3, generator=generator, dtype=torch.float64)
        else:
            yield x, torch.randint(3, (n,), generator=generator)


class Dense:
    """The algorithm with matrices: explicit J by reverse mode, H_L by autograd, Ĝ = JᵀH_LJ + (λ + μ)I."""

    def __init__(self, model, loss, damping=1.0, rho="auto", beta="auto", lr=1.0, decay=0.0, with_damping=True):
        self.model, self.loss, self.lr, self.decay, self.with_damping = model, get_loss(loss), lr, decay, with_damping
        self.damping, self.rates, self.count = damping, (rho, beta), 0
        self.w = parameter_vector(model)
        self.z = torch.zeros_like(self.w)

    def outputs(self, w, x):
        tensors, start = {}, 0
        for name, p in trainable_parameters(self.model).items():
            tensors[name] = w[start : start + p.numel()].view_as(p)
            start += p.numel()
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        torch.manual_seed(100 + self.count)
        return functional_call(self.model, {**tensors, **buffers}, (x,))

    def objective(self, w, x, y):
        return self.loss(self.outputs(w, x), y) + 0.5 * self.decay * w @ w

    def step(self, x, y):
        w, z, p = self.w, self.z, len(self.w)
        out = self.outputs(w, x).detach()
        jacobian = jacrev(lambda v: self.outputs(v, x).reshape(-1))(w)
        curvature = hessian(lambda o: self.loss(o.view_as(out), y))(out.reshape(-1))
        g = jacrev(lambda v: self.objective(v, x, y))(w)
        plain = jacobian.T @ curvature @ jacobian + self.decay * torch.eye(p, dtype=w.dtype)
        full = plain + self.damping * torch.eye(p, dtype=w.dtype)
        delta = full @ z + g
        span = torch.stack([delta, z], 1)
        x12 = -torch.linalg.pinv(span.T @ full @ span) @ (span.T @ g)
        rho = x12[1] if self.rates[0] == "auto" else self.rates[0]
        beta = -x12[0] if self.rates[1] == "auto" else self.rates[1]
        self.z = rho * z - beta * delta
        self.w = w + self.lr * self.z
        move = self.lr * self.z
        if self.count % 5 == 0:
            model_matrix = full if self.with_damping else plain
            predicted = g @ move + 0.5 * move @ model_matrix @ move
            ratio = (self.objective(self.w, x, y) - self.objective(w, x, y)) / predicted
            if ratio > 1.5:
                self.damping *= 0.999**5
            elif ratio < 0.5:
                self.damping /= 0.999**5
        self.count += 1
        return float(rho), float(beta)


def compare(model, steps, loss, **options):
    oracle_options = {k: v for k, v in options.items() if k in ("damping", "rho", "beta", "lr")}
    oracle_options["decay"] = options.get("weight_decay", 0.0)
    oracle_options["with_damping"] = options.get("damping_in_model", True)
    dense = Dense(copy.deepcopy(model), loss, **oracle_options)
    opt = CurveBall(model, loss=loss, **options)
    for step, (x, y) in enumerate(batches(steps, "mse" if loss == "mse" else "cross_entropy")):
        before = float(dense.loss(dense.outputs(dense.w, x), y))
        rho, beta = dense.step(x, y)
        torch.manual_seed(100 + step)
        loss_before = opt.step(x, y)
        assert float(loss_before) == pytest.approx(before, rel=1e-10)
        logged = opt.log()
        assert logged["rho"] == pytest.approx(rho, rel=1e-7, abs=1e-9)
        assert logged["beta"] == pytest.approx(beta, rel=1e-7)
        assert logged["damping"] == pytest.approx(dense.damping, rel=1e-12)
        torch.testing.assert_close(parameter_vector(model), dense.w, rtol=1e-8, atol=1e-8)
    assert opt.log()["anomalies"] == 0
    return opt


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("kind", ["mlp", "batchnorm", "convolution", "dropout"])
def test_ten_steps_equal_the_dense_computation(kind, loss):
    compare(network(kind), 10, loss)


def test_eval_mode_batch_norm_equals_the_dense_computation():
    model = network("convolution")
    for x, _ in batches(3, "mse"):
        model(x)
    compare(model.eval(), 4, "cross_entropy")


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "damping_in_model": False, "damping": 5.0},
        {"rho": 0.9, "beta": 0.05},
        {"lr": 0.5, "damping": 10.0},
        {"loss": CrossEntropy(label_smoothing=0.2)},
        {"loss": lambda out, y: (out.gather(1, y[:, None]) - 1).pow(4).mean() + out.cosh().mean()},
    ],
)
def test_options_equal_the_dense_computation(options):
    compare(network("mlp"), 7, **{"loss": "cross_entropy", **options})


def test_one_rate_given_the_other_is_the_minimum_along_its_line():
    for name, other in (("rho", "beta"), ("beta", "rho")):
        reference = network("mlp")
        (first, second) = batches(2, "cross_entropy")
        opt = CurveBall(reference, adapt_damping=False)
        opt.step(*first)
        state = copy.deepcopy(reference.state_dict()), copy.deepcopy(opt.state_dict())
        opt.step(*second)
        best = opt.log()
        # given the optimum of one rate, the line's minimum is the optimum of the plane
        model = network("mlp")
        model.load_state_dict(state[0])
        one = CurveBall(model, adapt_damping=False)
        one.load_state_dict(state[1])
        one.param_groups[0][name] = best[name]
        one.step(*second)
        assert one.log()[other] == pytest.approx(best[other], rel=1e-8)


def test_first_step_is_the_line_minimum_along_the_gradient():
    model = network("mlp")
    x, y = next(batches(1, "cross_entropy"))
    start = parameter_vector(model)
    g = flatten(torch.autograd.grad(get_loss("cross_entropy")(model(x), y), list(model.parameters())))
    opt = CurveBall(model, adapt_damping=False)
    opt.step(x, y)
    move = parameter_vector(model) - start
    assert opt.log()["rho"] == 0
    torch.testing.assert_close(move, -opt.log()["beta"] * g)


@pytest.mark.parametrize(
    ("loss", "label"), [(nn.CrossEntropyLoss(), -100), (nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 1.0])), 0)]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_minibatch_of_which_nothing_counts_gives_nan_and_leaves_the_rest_finite(first, loss, label):
    model = network("mlp")
    optimizer = CurveBall(model, loss)
    (x, y), (later, targets) = batches(2, "cross_entropy")
    if not first:
        optimizer.step(x, y)
    before = parameter_vector(model)
    assert optimizer.step(x, torch.full_like(y, label)).isnan()
    assert parameter_vector(model).isfinite().all()
    if first:
        assert torch.equal(parameter_vector(model), before)
    losses = [float(optimizer.step(later, targets)) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_damping_rule_moves_both_ways_and_only_at_its_interval():
    model = network("mlp")
    stream = list(batches(11, "cross_entropy"))
    rising = CurveBall(model, ratio_low=1e9, ratio_high=2e9)
    history = []
    for x, y in stream:
        rising.step(x, y)
        history.append(rising.damping)
    factor = 0.999**5
    assert history[0] == history[4] == pytest.approx(1 / factor)
    assert history[5] == history[9] == pytest.approx(1 / factor**2)
    assert history[10] == pytest.approx(1 / factor**3)
    falling = CurveBall(network("mlp"), ratio_low=-2e9, ratio_high=-1e9, damping_factor=0.999, damping_interval=1)
    for x, y in stream[:3]:
        falling.step(x, y)
    assert falling.damping == pytest.approx(0.999**3)


def test_a_ratio_that_is_not_finite_leaves_the_damping():
    """The squared error after the step overflows, the quadratic model's prediction does not."""

    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.exp(self.w * x)

    for x, y, beta, ratio in ((3.0, 1000.0, 1.0, math.inf), (0.5, 4000.0, 0.2, -math.inf)):
        opt = CurveBall(Exponential(), "mse", rho=0.0, beta=beta, damping_interval=1, damping_factor=0.5)
        opt.step(torch.tensor([[x]]), torch.tensor([[y]]))
        assert (opt.log()["ratio"], opt.log()["anomalies"], opt.damping) == (ratio, 1, 1)


def test_auto_damping_looks_for_batch_norm():
    assert CurveBall(network("batchnorm"), damping="auto").damping == 1
    assert CurveBall(network("mlp"), damping="auto").damping == 10


def test_running_statistics_move_once_and_without_a_tangent():
    model, plain = network("convolution"), network("convolution")
    x, y = next(batches(1, "cross_entropy"))
    plain(x)
    CurveBall(model).step(x, y)  # the first step applies the damping rule: three passes over the model
    for (name, got), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)
        assert torch.autograd.forward_ad.unpack_dual(got).tangent is None if got.is_floating_point() else True
        assert not got.requires_grad


def test_a_step_draws_randomness_once():
    model, opt = network("dropout"), CurveBall(network("dropout"))
    x, y = next(batches(1, "cross_entropy"))
    torch.manual_seed(5)
    model(x)
    expected = torch.rand(3)
    torch.manual_seed(5)
    opt.step(x, y)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["mlp", "convolution"])
def test_reload_continues_bit_for_bit(kind, tmp_path):
    model = network(kind).float()
    stream = [(x.float(), y) for x, y in batches(12, "cross_entropy")]
    opt = CurveBall(model, damping=3.0, weight_decay=1e-3)
    for x, y in stream[:6]:
        opt.step(x, y)
    torch.save((model.state_dict(), opt.state_dict()), tmp_path / "state.pt")
    other = network(kind).float()
    resumed = CurveBall(other)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for x, y in stream[6:]:
        assert torch.equal(opt.step(x, y), resumed.step(x, y))
    assert torch.equal(parameter_vector(model), parameter_vector(other))
    assert opt.log() == resumed.log()
    assert opt.costs.forward == resumed.costs.forward


class Gate(nn.Module):
    """A gate that the gradient takes for a constant, told by ``detach`` or by ``torch.no_grad``."""

    def __init__(self, detach: bool):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.detach = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), detach

    def forward(self, x):
        h = self.a(x)
        if self.detach:
            return self.b(h * torch.tanh(h).detach())
        with torch.no_grad():
            gate = torch.tanh(h)
        return self.b(h * gate)


def test_constants_by_no_grad_are_those_by_detach():
    losses = []
    for detach in (True, False):
        optimizer = CurveBall(Gate(detach))
        losses.append([float(optimizer.step(x, y)) for x, y in batches(6, "cross_entropy")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_function_may_lose_its_tangents_after_the_first_call():
    class Swish(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    def swish(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    losses = []
    for function in (swish, torch.jit.script(swish)):
        model = network("mlp")
        model[1] = Swish(function)
        optimizer = CurveBall(model)
        losses.append([float(optimizer.step(x, y)) for x, y in batches(8, "cross_entropy")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["mlp", "batchnorm", "convolution"])
def test_scripted_models_take_the_steps_of_eager_ones(kind):
    losses = []
    for script in (lambda m: m, torch.jit.script):
        optimizer = CurveBall(script(network(kind)))
        losses.append([float(optimizer.step(x, y)) for x, y in batches(6, "cross_entropy")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


def test_the_transpose_is_checked_at_the_first_steps_and_when_modes_change():
    model, calls = network("mlp"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = CurveBall(model, adapt_damping=False)
    counts = []
    for i, (x, y) in enumerate(batches(10, "cross_entropy")):
        model.train(i < 5)
        calls.clear()
        optimizer.step(x, y)
        counts.append(len(calls))
    assert counts == [3, 3, 3, 2, 2] * 2


def test_costs_count_passes():
    opt = CurveBall(network("mlp"))
    for x, y in batches(6, "cross_entropy"):
        opt.step(x, y)
    assert (opt.costs.forward, opt.costs.backward, opt.costs.jvp, opt.costs.products) == (6 + 2, 6, 12, 6)
    fixed = CurveBall(network("mlp"), rho=0.9, beta=0.1, adapt_damping=False)
    fixed.step(*next(batches(1, "cross_entropy")))
    assert (fixed.costs.forward, fixed.costs.jvp) == (1, 1)


def test_nearly_singular_system_uses_the_pseudo_inverse():
    def scalars(*values):
        return tuple(torch.tensor(v, dtype=torch.float64) for v in values)

    a, b = scalars(4.0, 2.0, 1.0), scalars(2.0, 1.0)
    x = _solve_scaled(a, b, 1e-15)  # both directions are parallel: any minimum moves by the same vector
    assert float(2 * x[0] + x[1]) == pytest.approx(-1.0)
    x = _solve_scaled(scalars(4.0, -2.0, 1.0), scalars(2.0, -1.0), 1e-15)
    assert float(2 * x[0] - x[1]) == pytest.approx(-1.0)
    regular = _solve_scaled(scalars(4.0, 1.0, 3.0), scalars(1.0, -2.0), 1e-15)
    expected = -torch.linalg.solve(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(torch.stack(regular).float(), expected)


def test_non_finite_solution_is_counted_and_drops_the_momentum():
    model = network("mlp")
    stream = list(batches(2, "cross_entropy"))
    opt = CurveBall(model, adapt_damping=False)
    opt.step(*stream[0])
    for p in model.parameters():  # overflow the products that contain z, not those of the new direction
        opt.state[p]["z"].fill_(float("inf"))
    opt.step(*stream[1])
    assert opt.log()["anomalies"] == 1
    assert opt.log()["rho"] == 0


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"lr": 0.0}, "lr"),
        ({"rho": -1.0}, "rho"),
        ({"beta": "best"}, "best"),
        ({"damping": -1.0}, "damping"),
        ({"damping_factor": 1.5}, "1.5"),
        ({"damping_interval": 0}, "damping_interval"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"ratio_low": 2.0}, "ratio_low"),
    ],
)
def test_bad_hyper_parameters_are_named(options, shown):
    with pytest.raises(ValueError, match=shown):
        CurveBall(network("mlp"), **options)


def test_a_second_param_group_is_refused():
    opt = CurveBall(network("mlp"))
    with pytest.raises(ValueError, match="one param group"):
        opt.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
