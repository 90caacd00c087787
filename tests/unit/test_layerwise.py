"""Class gradients layer by layer, against one backward pass a class."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace.curvature.class_gradients import class_gradients, split_pass, vjp_pass
from curvspace.curvature.layerwise import LayerRecorder

C, N = 4, 12


def _conv(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1), *more, nn.Flatten(), nn.LazyLinear(C))


class Twice(nn.Module):
    """One layer used twice, one in-place operation on a layer's output, tokens in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)[:, :5, :].repeat(1, 1, 2)
        return self.b(self.a(torch.relu_(self.a(tokens)))).mean(1)


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.Tanh(), nn.Linear(5, C)),
    "convolution": lambda: _conv(nn.ReLU(inplace=True), nn.Conv2d(4, 6, 2, dilation=2, groups=2), nn.ReLU()),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 2, 3), nn.Flatten(), nn.LazyLinear(C)),
    "stored statistics": lambda: _conv(nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4)),
    "layer norm": lambda: _conv(nn.LayerNorm((4, 3, 3)), nn.GELU(), nn.Dropout(0.5)),
    "used twice": Twice,
}


class Foreign(nn.Module):
    """A parameter that enters by a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gain = nn.Linear(108, C), nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.flatten(1)) * self.gain


class Tied(nn.Module):
    """A layer's weight that is used beside the layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(108, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1)))) + (self.a.weight**2).sum()


class TokensFirst(nn.Module):
    """As many tokens as examples, and the tokens along the first dimension: shapes alone would deceive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(9, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).repeat(1, 4, 1).transpose(0, 1)  # (12 tokens, 12 examples, 36)
        return self.b(torch.tanh(self.a(tokens[..., :9]))).mean(0)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "foreign parameter": Foreign,
    "weight used elsewhere": Tied,
    "tokens first": TokensFirst,
    "same padding": lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding="same"), nn.Flatten(), nn.LazyLinear(C)),
    "weight norm": lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(108, C))),
}


def network(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    model(torch.zeros(2, 3, 6, 6))
    return model.double().eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 6, 6, generator=generator).double(), torch.tensor([0, 3, 0, 1, 1, 0, 3, 3, 1, 0, 0, 3])


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_class_gradients_equal_those_of_one_backward_pass_a_class(name: str) -> None:
    model, (x, y) = network({**KNOWN, **UNKNOWN}[name]), batch()
    expected = vjp_pass(model, x, y, C)
    for _ in range(3):  # the first is checked by the library itself, the later ones rely on that
        found = split_pass(model, x, y, C)
        torch.testing.assert_close(found.class_gradients, expected.class_gradients, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.probabilities, expected.probabilities)
        assert found.class_gradients[2].norm() == 0


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_so_do_those_without_a_loss(name: str) -> None:
    model, (x, y) = network({**KNOWN, **UNKNOWN}[name]), batch()
    expected = vjp_pass(model, x, y, C)
    for _ in range(2):
        found, counts = class_gradients(model, x, y, C)
        torch.testing.assert_close(found, expected.class_gradients, rtol=0, atol=1e-12)
        assert counts.tolist() == [5, 3, 0, 4]


@pytest.mark.parametrize("examples", [1, 5, 7])
def test_a_batch_cut_into_passes_gives_the_same(examples: int, monkeypatch) -> None:
    model, (x, y) = network(KNOWN["convolution"]), batch()
    whole, _ = class_gradients(model, x, y, C)
    monkeypatch.setattr(sys.modules[class_gradients.__module__], "AT_ONCE", examples)
    torch.testing.assert_close(class_gradients(model, x, y, C)[0], whole, rtol=0, atol=1e-12)


class ByReference(nn.Module):
    """A layer's weight that is used a second time from a list, where it cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(108, 5), nn.Linear(5, C)
        self.held = [self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x.flatten(1)))
        return self.b(hidden) + F.linear(hidden, self.held[0])


def test_a_weight_used_by_reference_is_told() -> None:
    model, (x, y) = network(ByReference), batch()
    split_pass(model, x, y, C)  # by the model's own parameters, where it is right
    for _ in range(2):
        with pytest.raises(ValueError, match="by references kept outside"):
            class_gradients(model, x, y, C)


@pytest.mark.parametrize(("name", "complete"), [*((n, True) for n in KNOWN), *((n, False) for n in UNKNOWN)])
def test_which_models_are_known_layer_by_layer(name: str, complete: bool) -> None:
    model, (x, _) = network({**KNOWN, **UNKNOWN}[name]), batch()
    with LayerRecorder(list(model.parameters()), N) as recorder:
        model(x)
    assert recorder.complete == (complete or name == "tokens first")  # which only a comparison finds out


def test_frozen_parameters_and_passes_without_dropout_masks_shared() -> None:
    model, (x, y) = network(KNOWN["convolution"]), batch()
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(
        split_pass(model, x, y, C).class_gradients, vjp_pass(model, x, y, C).class_gradients, rtol=0, atol=1e-12
    )


def test_gradient_is_that_of_plain_training() -> None:
    model, (x, y) = network(KNOWN["convolution"]), batch()
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert torch.equal(split_pass(model, x, y, C).gradient, torch.cat([g.reshape(-1) for g in plain]))
