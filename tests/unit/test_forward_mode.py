"""Forward-mode passes that share their primal, against torch.func.jvp without any of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, jvp

from curvspace.functional import trainable_parameters
from curvspace.optim.forward_mode import DoubleBackward, ForwardMode, Linearisation, linearise
from tests.unit import odd_layers
from tests.unit.backward_passes import OnceTanh


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu_(self.first(x))))


def cases():
    conv = lambda *more: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *more)  # noqa: E731
    head = (nn.Flatten(), nn.LazyLinear(4))
    return {
        "inplace": conv(nn.ReLU(inplace=True), nn.MaxPool2d(2), Residual(), *head),
        "batch norm": conv(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *head),
        "no affine, no statistics": conv(nn.BatchNorm2d(3, affine=False, track_running_stats=False), *head),
        "overlapping pools": conv(nn.MaxPool2d(3, 1), nn.Tanh(), nn.MaxPool2d(3, 2, ceil_mode=True), *head),
        "one dimension": nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 3, 3), nn.MaxPool1d(2), nn.ReLU(), *head),
        "grouped, dilated": conv(nn.Conv2d(3, 6, 3, groups=3, dilation=2), nn.ReLU(), *head),
        "tied": tied(),
        "normalised weight": nn.Sequential(nn.Flatten(), normalised(nn.Linear(72, 4))),
    }


class UnitRows(nn.Module):
    def forward(self, weight):
        return weight / weight.square().sum(1, keepdim=True).sqrt()


def normalised(layer: nn.Module) -> nn.Module:
    """Each pass computes the weight anew, so that nothing kept may be used in its place."""
    nn.utils.parametrize.register_parametrization(layer, "weight", UnitRows())
    return layer


def tied() -> nn.Module:
    layer = nn.Linear(72, 72)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(72, 4))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", ["none", "weights", "biases", "first layer"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(cases()))
def test_products_equal_jvp(name, training, frozen, channels_last):
    torch.manual_seed(0)
    model = cases()[name]
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model.double()(x)  # materialises the lazy layer and moves running statistics off their start
    model.train(training)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    chosen = {"none": "-", "weights": "weight", "biases": "bias", "first layer": "0."}[frozen]
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(chosen not in parameter_name)
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("nothing left to differentiate")
    parameters = trainable_parameters(model)
    plain = copy.deepcopy(model)

    def outputs(tensors):
        buffers = {n: b.clone() for n, b in plain.named_buffers()}
        return functional_call(plain, {**tensors, **buffers}, (x,))

    detached = {n: p.detach() for n, p in parameters.items()}
    directions = [{n: torch.randn_like(p) for n, p in detached.items()} for _ in range(3)]
    point = ForwardMode(model, x, list(directions[0].values()))
    expected, first = jvp(outputs, (detached,), (directions[0],))
    torch.testing.assert_close(point.outputs.detach(), expected)
    torch.testing.assert_close(point.first, first)
    for direction in directions[1:]:
        torch.testing.assert_close(point.push(list(direction.values())), jvp(outputs, (detached,), (direction,))[1])
    cotangent = torch.randn_like(expected)
    pulled = point.pull(cotangent)
    inner = sum((g * directions[0][n]).sum() for n, g in zip(parameters, pulled, strict=True))
    torch.testing.assert_close(inner, (cotangent * first).sum())


def test_replay_sees_the_same_masks_at_new_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    x = torch.randn(3, 4)
    point = ForwardMode(model, x, [torch.zeros_like(p) for p in model.parameters()])
    torch.testing.assert_close(point.replay(), point.outputs.detach())
    with torch.no_grad():
        model[2].bias += 1
    torch.testing.assert_close(point.replay(), point.outputs.detach() + 1)


@pytest.mark.parametrize("name", odd_layers.NETWORKS)
@pytest.mark.parametrize("way", [ForwardMode, DoubleBackward])
def test_odd_layers_against_central_differences(name: str, way: type) -> None:
    """J v and Jᵀu by whichever way serves, dropout masks and spectral norm's vectors held."""
    model, x, _ = odd_layers.problem(name)
    parameters = list(model.parameters())
    first, second = ([torch.randn_like(p) for p in parameters] for _ in range(2))
    u = torch.randn(8, odd_layers.C).double()
    point = linearise(model, x, first, way)
    pulled = point.pull(u)
    pushed = point.push(second)

    def moved(direction: list[Tensor], step: float) -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
            outputs = point.replay()
            torch._foreach_add_(parameters, direction, alpha=-step)
        return outputs

    for direction, found in ((first, point.first), (second, pushed)):
        expected = (moved(direction, 1e-5) - moved(direction, -1e-5)) / 2e-5
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        inner = sum((a * b).sum() for a, b in zip(direction, pulled, strict=True))
        torch.testing.assert_close(inner, (u * expected).sum(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(point.replay(), point.outputs.detach())


@pytest.mark.parametrize("name", odd_layers.NETWORKS)
def test_odd_layers_move_buffers_and_generators_once(name: str) -> None:
    model, x, _ = odd_layers.problem(name)
    plain, _, _ = odd_layers.problem(name)
    torch.manual_seed(5)
    plain(x)
    generator = torch.get_rng_state()
    torch.manual_seed(5)
    point = linearise(model, x, zeros(model))
    point.push(zeros(model))
    assert torch.equal(torch.get_rng_state(), generator)
    for (key, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=key)


class Gated(nn.Module):
    """What ``by`` makes of the first layer is a constant to the backward pass."""

    def __init__(self, by) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.a, self.b, self.by = nn.Linear(4, 5), nn.Linear(5, 3), by

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            constant = self.by(h)
        return self.b(torch.tanh(h) * constant)


class WrongRule(torch.autograd.Function):
    """a², whose forward-mode rule forgets a factor."""

    @staticmethod
    def forward(ctx, a):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a)
        ctx.save_for_forward(a)
        return a * a

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):  # type: ignore[no-untyped-def]
        return ctx.saved_tensors[0] * t


class Called(nn.Module):
    """An activation by any callable."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


INCONSISTENT = {
    "gate": lambda: Gated(torch.sigmoid),
    "statistics": lambda: Gated(lambda h: 1 / h.std(0)),
    "codebook": lambda: Gated(lambda h: h.round() + 0.1 * h),
    "wrong rule": lambda: nn.Sequential(nn.Linear(4, 5), Called(WrongRule.apply), nn.Linear(5, 3)),
}


def reverse_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(outputs, parameters), row by row from backward passes."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(z, parameters, retain_graph=True) for z in model(x).reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INCONSISTENT)
def test_products_are_those_of_the_backward_jacobian(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = INCONSISTENT[name]().to(dtype), torch.randn(6, 4, dtype=dtype)
    J = reverse_jacobian(model, x)
    first, second = ([torch.randn_like(p) for p in model.parameters()] for _ in range(2))
    point = linearise(model, x, first)
    for tangents, found in ((first, point.first), (second, point.push(second))):
        torch.testing.assert_close(found.reshape(-1), J @ torch.cat([t.reshape(-1) for t in tangents]))
    u = torch.randn(6, 3, dtype=dtype)
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in point.pull(u)]), J.T @ u.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(cases()))
def test_where_dual_numbers_serve_they_stay(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = cases()[name], torch.randn(5, 2, 6, 6, dtype=dtype)
    model.to(dtype)(x)
    assert type(linearise(model, x, [torch.randn_like(p) for p in model.parameters()])) is ForwardMode


@torch.jit.script
def scripted_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


SCRIPTED = {
    "whole": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
    "part": lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh())), nn.Linear(5, 3)),
    "batch norm": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))),
    "traced": lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)),
    "function": lambda: nn.Sequential(nn.Linear(4, 5), Called(scripted_swish), nn.Linear(5, 3)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_modules_call_after_call(name: str) -> None:
    """TorchScript optimises its graph after the first call."""
    torch.manual_seed(0)
    model, x = SCRIPTED[name](), torch.randn(6, 4)
    for _ in range(4):
        J = reverse_jacobian(model, x)
        tangents = [torch.randn_like(p) for p in model.parameters()]
        along = J @ torch.cat([t.reshape(-1) for t in tangents])
        point = linearise(model, x, tangents)
        torch.testing.assert_close(point.first.reshape(-1), along)
        torch.testing.assert_close(point.push(tangents).reshape(-1), along)
        torch.testing.assert_close(point.replay(), point.outputs.detach())


def test_lost_tangents_are_an_error() -> None:
    """Outputs that depend on the parameters and have no tangent."""
    lost = lambda x: torch.zeros_like(x).requires_grad_() + forward_ad.unpack_dual(x).primal  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 3), Called(lost))
    with pytest.raises(RuntimeError, match="Sequential has lost its tangents"):
        ForwardMode(model, torch.randn(6, 4), zeros(model))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_function_that_is_once_differentiable_is_named(place: int) -> None:
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers[:place], Called(OnceTanh.apply), *layers[place:])
    if place == 0:  # no parameter before it: nothing is missing
        x = torch.randn(8, 4)
        J, tangents = reverse_jacobian(model, x), [torch.randn_like(p) for p in model.parameters()]
        found = linearise(model, x, tangents).first
        torch.testing.assert_close(found.reshape(-1), J @ torch.cat([t.reshape(-1) for t in tangents]))
        return
    with pytest.raises(ValueError, match=r"has a layer with neither.*once_differentiable"):
        linearise(model, torch.randn(8, 4), zeros(model))


def zeros(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) for p in model.parameters()]


def test_a_layer_with_neither_is_named() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"Sequential has a layer with neither.*replace it.*_embedding_bag"):
        linearise(model, torch.randint(10, (8, 4)), zeros(model))


def test_the_models_own_errors_pass_through() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linearise(model, torch.randn(8, 4), zeros(model))


@pytest.mark.parametrize("layer", [nn.Tanh, nn.GELU])
def test_a_linearisation_made_by_its_name_pushes_central_differences(layer):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), layer(), nn.Linear(5, 2)).double(), torch.randn(4, 3).double()
    tangents = [torch.randn_like(p) for p in model.parameters()]
    point = Linearisation(model, x, tangents)

    def outputs(h: float) -> torch.Tensor:
        moved = {n: p + h * t for (n, p), t in zip(model.named_parameters(), tangents, strict=True)}
        return torch.func.functional_call(model, moved, (x,)).detach()

    expected = (outputs(1e-6) - outputs(-1e-6)) / 2e-6
    torch.testing.assert_close(point.first, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(point.push(tangents), expected, rtol=1e-7, atol=1e-8)
