"""Forward-mode passes that share their primal, against torch.func.jvp without any of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from curvspace.functional import trainable_parameters
from curvspace.optim.forward_mode import Linearisation


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
    point = Linearisation(model, x, list(directions[0].values()))
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
    point = Linearisation(model, x, [torch.zeros_like(p) for p in model.parameters()])
    torch.testing.assert_close(point.replay(), point.outputs.detach())
    with torch.no_grad():
        model[2].bias += 1
    torch.testing.assert_close(point.replay(), point.outputs.detach() + 1)
