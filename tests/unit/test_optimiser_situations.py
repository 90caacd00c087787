"""Every optimiser in users' situations: it does what is right there, or says in one line what to do instead."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import optim
from curvspace.functional import parameter_vector
from curvspace.optim.base import ModelOptimizer
from curvspace.optim.kfac import KFAC
from tests.unit import odd_layers

C = 3
MAKE: dict[str, Callable[[nn.Module], ModelOptimizer]] = {
    "adam": lambda m: optim.FirstOrder(m, torch.optim.Adam, lr=0.01),
    "paper A": lambda m: optim.class_gradient_newton(m, C, damping=1.0),
    "Rayleigh-Ritz": lambda m: optim.rayleigh_ritz_newton(m, C, past_updates=1, cospace="adam", lr=0.01),
    "adaptive": lambda m: optim.rayleigh_ritz_newton(m, C, damping="adaptive", refresh_every=2),
    "low rank": lambda m: optim.low_rank_newton(m, C, refresh_every=2, damping=0.5),
    "FOSI": lambda m: optim.fosi(m, 2, smallest=1, refresh_every=2, warmup=1, max_products=20),
    "CurveBall": lambda m: optim.CurveBall(m),
    "negative curvature": lambda m: optim.NegativeCurvature(m, lr=1e-3),
    "Levenberg-Marquardt": lambda m: optim.LevenbergMarquardt(m, "cross_entropy"),
}
SECOND_ORDER = [name for name in MAKE if name != "adam"]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)


def data(n: int = 20, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator).to(dtype), torch.randint(C, (n,), generator=generator)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "deepcopy with a scheduler"])
@pytest.mark.parametrize("name", MAKE)
def test_a_copy_goes_on_as_the_original(name: str, way: str) -> None:
    x, y = data()
    optimizer = MAKE[name](network())
    if way == "deepcopy with a scheduler":
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    for _ in range(3):
        optimizer.step(x, y)
    twin = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
    assert twin.model is not optimizer.model
    before = parameter_vector(optimizer.model)
    losses = [float(twin.step(x, y)) for _ in range(3)]
    assert torch.equal(parameter_vector(optimizer.model), before)  # the copy moves its own model
    assert losses == [float(optimizer.step(x, y)) for _ in range(3)]
    assert torch.equal(parameter_vector(optimizer.model), parameter_vector(twin.model))
    assert twin.state_dict()["steps"] == 6


@pytest.mark.parametrize("change", ["frozen", "unfrozen", "added"])
@pytest.mark.parametrize("name", MAKE)
def test_parameters_that_changed_since(name: str, change: str) -> None:
    x, y = data()
    model = network()
    if change == "unfrozen":
        model[0].bias.requires_grad_(False)
    optimizer = MAKE[name](model)
    optimizer.step(x, y)
    if change == "added":
        model.append(nn.Linear(C, C).double())
    else:
        model[0].bias.requires_grad_(change == "unfrozen")
    if name == "adam" and change == "frozen":  # torch's optimisers leave a frozen parameter alone
        before = model[0].bias.clone()
        optimizer.step(x, y)
        assert torch.equal(model[0].bias, before)
        return
    with pytest.raises(ValueError, match=r"trainable parameters of Sequential have changed.*make a new optimiser"):
        optimizer.step(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_parameters_that_are_no_real_numbers_of_full_length(name: str, dtype: torch.dtype) -> None:
    model = network(torch.float32)
    model[2].weight = nn.Parameter(model[2].weight.detach().to(dtype))
    with pytest.raises(ValueError, match=r"'2.weight' is (torch\.\w+|complex)"):
        MAKE[name](model)


def test_torchs_own_optimisers_take_complex_parameters() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    optimizer = optim.FirstOrder(model, torch.optim.Adam, lambda z, y: (z - y).abs().square().mean(), lr=0.05)
    x, y = torch.randn(9, 2, dtype=torch.complex64), torch.randn(9, 2, dtype=torch.complex64)
    losses = [float(optimizer.step(x, y)) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_parameters_of_two_types_are_named() -> None:
    model = network(torch.float32)
    model[2].double()
    with pytest.raises(ValueError, match=r"one type on one device, but '0.weight' is torch.float32 .* '2.weight'"):
        optim.CurveBall(model)


@pytest.mark.parametrize("name", MAKE)
def test_steps_inside_autocast_see_the_present_parameters(name: str) -> None:
    """One autocast context around several steps keeps casts of the weights; each step must see them anew."""
    x, y = data(dtype=torch.float32)
    around, inside = network(torch.float32), network(torch.float32)
    first, second = MAKE[name](around), MAKE[name](inside)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(float(first.step(x, y)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses == [float(second.step(x, y)) for _ in range(6)]
        loss = F.cross_entropy(inside(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(loss) == float(F.cross_entropy(around(x), y))
    assert losses[-1] < losses[0]
    assert torch.equal(parameter_vector(around), parameter_vector(inside))


@pytest.mark.parametrize("make", [lambda m: optim.CurveBall(m, damping_interval=1), MAKE["adaptive"]])
def test_the_ratio_of_adaptive_damping_under_autocast_is_about_that_without(make: Callable) -> None:
    x, y = data(64, torch.float32)
    logs = []
    for enabled in (False, True):
        optimizer = make(network(torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for _ in range(5):
                optimizer.step(x, y)
        logs.append(optimizer.log())
    name = "ratio" if "ratio" in logs[0] else "reduction_ratio"
    assert float(logs[1][name]) == pytest.approx(float(logs[0][name]), rel=0.3)


class Functional(nn.Module):
    """Dropout that no module announces."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 60), nn.Linear(60, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, training=True))


def _dropout(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "functional":
        return Functional().double()
    return nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Dropout(0.5), nn.Linear(60, C)).double()


@pytest.mark.parametrize("kind", ["module", "functional"])
@pytest.mark.parametrize("name", ["Rayleigh-Ritz", "class by class", "CurveBall"])
def test_adaptive_damping_compares_under_the_same_dropout_masks(kind: str, name: str) -> None:
    """With a step of length 0 the actual reduction is 0: any other value would come from other masks."""
    x, y = data()
    model = _dropout(kind)
    seen: list[float] = []
    if name == "CurveBall":
        curveball = optim.CurveBall(model, rho=0.0, beta=1e-12, lr=1e-12, damping_interval=1)
        curveball._adapt_damping = lambda change, predicted: seen.append(float(change))  # type: ignore[method-assign]
        optimizer: ModelOptimizer = curveball
    else:
        rule = optim.RayleighRitzNewton(optim.AdaptiveDamping(every=1), scale=1e-14)
        rule.judge = lambda coordinates, coefficients, actual: seen.append(float(actual))  # type: ignore[method-assign]
        basis = optim.ClassGradients(orthonormal=True) if name == "class by class" else optim.RandomDirections(3)
        optimizer = optim.SubspaceNewton(model, basis, rule, optim.Drop(0.0))
    generator = torch.get_rng_state()
    for _ in range(3):
        optimizer.step(x, y)
    assert len(seen) == 3
    assert max(abs(value) for value in seen) < 1e-10
    assert not torch.equal(torch.get_rng_state(), generator)  # each step has masks of its own


@pytest.mark.parametrize("form", ["vector", "one pixel", "small image"])
@pytest.mark.parametrize("name", MAKE)
def test_batch_normalisation_of_one_value_is_torchs_error(name: str, form: str) -> None:
    """One example without other pixels has no variance; running statistics must not become NaN."""
    torch.manual_seed(0)
    if form == "vector":
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C))
        x = torch.randn(1, 4)
    else:
        layers = [nn.Conv2d(1, 6, 2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten()]
        size = 2 if form == "one pixel" else 3
        model = nn.Sequential(*layers, nn.Linear(6 * (size - 1) ** 2, C))
        x = torch.randn(1, 1, size, size)
    model.double()
    optimizer = MAKE[name](model)
    if form == "small image":
        optimizer.step(x.double(), torch.tensor([1]))
    else:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            optimizer.step(x.double(), torch.tensor([1]))
    assert all(b.isfinite().all() for b in model.buffers())
    assert parameter_vector(model).isfinite().all()


@pytest.mark.parametrize("part", ["whole", "in place", "layer", "function"])
@pytest.mark.parametrize("name", MAKE)
def test_compiled_models_step_as_the_others_do(name: str, part: str) -> None:
    x, y = data()
    plain, compiled = network(), network()
    model: nn.Module = compiled
    if part == "whole":
        model = torch.compile(compiled, backend="aot_eager")  # type: ignore[assignment]
    elif part == "in place":
        compiled.compile(backend="aot_eager")
    elif part == "layer":
        compiled[2] = torch.compile(compiled[2], backend="aot_eager")  # type: ignore[assignment]
    else:
        compiled[1].forward = torch.compile(torch.tanh, backend="aot_eager")  # type: ignore[method-assign]
    first, second = MAKE[name](plain), MAKE[name](model)
    losses = [(float(first.step(x, y)), float(second.step(x, y))) for _ in range(4)]
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], abs=1e-12)
    torch.testing.assert_close(parameter_vector(compiled), parameter_vector(plain), rtol=0, atol=1e-12)


class Form(nn.Module):
    """A network whose outputs come in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = network(), form

    def forward(self, x: Tensor) -> object:
        z = self.inner(x)
        forms = {"mapping": {"logits": z, "hidden": x}, "tuple of one": (z,), "tuple": (z, x.sum(1))}
        return forms.get(self.form) or SimpleNamespace(logits=z)


def _by_hand(outputs: object, targets: Tensor) -> Tensor:
    """A callable that takes the outputs as they are."""
    z = outputs if isinstance(outputs, Tensor) else outputs["logits"] if isinstance(outputs, dict) else outputs[0]  # type: ignore[index]
    return F.cross_entropy(z, targets)


LOSSES = {"own": _by_hand, "known": "cross_entropy"}


def _with_loss(name: str, model: nn.Module, loss: object) -> ModelOptimizer:
    make = {
        "adam": lambda: optim.FirstOrder(model, torch.optim.Adam, loss, lr=0.01),
        "paper A": lambda: optim.class_gradient_newton(model, C, damping=1.0, loss=loss),
        "Rayleigh-Ritz": lambda: optim.rayleigh_ritz_newton(model, C, loss=loss),
        "adaptive": lambda: optim.rayleigh_ritz_newton(model, C, damping="adaptive", loss=loss),
        "low rank": lambda: optim.low_rank_newton(model, C, damping=0.5, curvature="gauss-newton", loss=loss),
        "FOSI": lambda: optim.fosi(model, 2, warmup=1, refresh_every=2, loss=loss),
        "CurveBall": lambda: optim.CurveBall(model, loss),
        "negative curvature": lambda: optim.NegativeCurvature(model, lr=1e-3, loss=loss),
        "Levenberg-Marquardt": lambda: optim.LevenbergMarquardt(model, loss),
    }
    return make[name]()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        ("mapping", "own"),
        ("mapping", "known"),
        ("tuple of one", "own"),
        ("tuple of one", "known"),
        ("object", "known"),
    ],
)
@pytest.mark.parametrize("name", MAKE)
def test_outputs_in_other_forms(name: str, form: str, loss: str) -> None:
    x, y = data()
    plain, formed = network(), Form(form)
    first, second = _with_loss(name, plain, "cross_entropy"), _with_loss(name, formed, LOSSES[loss])
    losses = [(float(first.step(x, y)), float(second.step(x, y))) for _ in range(3)]
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], abs=1e-9)
    torch.testing.assert_close(parameter_vector(formed), parameter_vector(plain), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", MAKE)
def test_outputs_that_do_not_say_which_are_logits(name: str) -> None:
    x, y = data()
    with pytest.raises(ValueError, match=r"outputs are a tuple without one tensor or \.logits"):
        _with_loss(name, Form("tuple"), "cross_entropy").step(x, y)


@pytest.mark.parametrize("name", [n for n in MAKE if n not in ("paper A", "Rayleigh-Ritz", "adaptive")])
def test_class_probabilities_as_targets(name: str) -> None:
    x, y = data()
    hard, soft = network(), network()
    first, second = MAKE[name](hard), MAKE[name](soft)
    one_hot = F.one_hot(y, C).double()
    losses = [(float(first.step(x, y)), float(second.step(x, one_hot))) for _ in range(3)]
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], abs=1e-9)
    torch.testing.assert_close(parameter_vector(soft), parameter_vector(hard), rtol=0, atol=1e-8)


@pytest.mark.parametrize("targets", ["probabilities", "real numbers"])
@pytest.mark.parametrize("name", ["paper A", "Rayleigh-Ritz"])
def test_class_gradients_say_that_they_need_classes(name: str, targets: str) -> None:
    x, y = data()
    loss, given = ("cross_entropy", F.one_hot(y, C).double()) if targets == "probabilities" else ("mse", x[:, :C])
    with pytest.raises(ValueError, match=r"class gradients need integer targets of shape \(N,\)"):
        _with_loss(name, network(), loss).step(x, given)


def test_curveball_refuses_a_loss_that_reads_the_parameters() -> None:
    x, y = data()
    model = network()
    penalised = lambda z, t: F.cross_entropy(z, t) + 0.01 * sum(p.square().sum() for p in model.parameters())  # noqa: E731
    with pytest.raises(ValueError, match=r"reads the model's parameters itself.*use weight_decay"):
        optim.CurveBall(model, penalised).step(x, y)


@pytest.mark.parametrize("name", MAKE)
def test_reentrant_checkpoints_hide_no_parameter(name: str) -> None:
    """Gradients taken by ``autograd.grad`` would leave out what a reentrant checkpoint uses."""
    x, y = data(8)
    plain, checkpointed = odd_layers.Checkpointed(None), odd_layers.Checkpointed(True)
    checkpointed.load_state_dict(plain.state_dict())
    first, second = MAKE[name](plain.double().eval()), MAKE[name](checkpointed.double().eval())
    for _ in range(3):
        first.step(x, y)
        second.step(x, y)
    torch.testing.assert_close(parameter_vector(checkpointed), parameter_vector(plain), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", odd_layers.NETWORKS)
@pytest.mark.parametrize("optimizer", ["Rayleigh-Ritz", "low rank", "CurveBall", "negative curvature"])
def test_odd_layers_step(optimizer: str, name: str, dtype: torch.dtype) -> None:
    model, x, y = odd_layers.problem(name, dtype)
    stepper = MAKE[optimizer](model)
    if name == "attention with dropout" and optimizer in ("Rayleigh-Ritz", "low rank"):
        with pytest.raises((RuntimeError, ValueError), match=r"not deterministic|does not treat examples one by one"):
            stepper.step(x, y)
        return
    assert all(torch.isfinite(stepper.step(x, y)) for _ in range(3))


def test_a_shared_module_keeps_its_parameters() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.branches = nn.ModuleDict({"a": self.inner[0]})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[2](torch.tanh(self.branches["a"](x)))

    x, y = data()
    for name, make in MAKE.items():
        plain, shared = network(), Siamese()
        first, second, held = make(plain), make(shared), list(shared.parameters())
        for _ in range(3):
            first.step(x, y)
            second.step(x, y)
        assert all(p is q for p, q in zip(held, shared.parameters(), strict=True)), name
        torch.testing.assert_close(parameter_vector(shared), parameter_vector(plain), rtol=0, atol=1e-9, msg=name)


CLASSES = {
    "paper A": lambda m: optim.class_gradient_newton(m, C, damping=1.0),
    "Rayleigh-Ritz": lambda m: optim.rayleigh_ritz_newton(m, C),
    "bulk": lambda m: optim.bulk_sgd(m, C, span="class-gradients"),
    "adam": MAKE["adam"],
    "CurveBall": MAKE["CurveBall"],
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
@pytest.mark.parametrize("name", CLASSES)
def test_labels_of_any_integer_type(name: str, dtype: torch.dtype) -> None:
    """The steps are those with torch's usual int64."""
    x, y = data()
    usual, other = (CLASSES[name](network()) for _ in range(2))
    for _ in range(2):
        assert torch.equal(usual.step(x, y), other.step(x, y.to(dtype)))
    assert torch.equal(parameter_vector(usual.model), parameter_vector(other.model))


@pytest.mark.parametrize("name", [*MAKE, "K-FAC"])
def test_the_norm_of_the_gradient_is_there_where_the_gradient_is_formed(name: str) -> None:
    (x, y), model = data(), network()
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    optimizer = {**MAKE, "K-FAC": KFAC}[name](model)
    optimizer.step(x, y)
    if name == "CurveBall":
        assert optimizer.grad_norm is None
    else:
        torch.testing.assert_close(optimizer.grad_norm, torch.cat([g.flatten() for g in expected]).norm())
