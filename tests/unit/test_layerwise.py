"""Class gradients layer by layer, against one backward pass a class."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace.curvature.class_gradients import class_gradients, split_pass, vjp_pass
from curvspace.curvature.layerwise import LayerRecorder, moves_examples

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
        z = model(x)
    assert not moves_examples(z, N)
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


def _written_back(h: Tensor, order: Tensor) -> Tensor:
    out = h.new_zeros(h.shape)
    out[order] = h
    return out


def _one_by_one(h: Tensor, order: Tensor) -> Tensor:
    places = order.argsort().tolist()
    return torch.stack([h[i] for i in places])


def _column(order: Tensor, h: Tensor) -> Tensor:
    return order[:, None].expand_as(h)


UNDONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "indices": lambda h, order: h[order.argsort()],
    "list": lambda h, order: h[order.argsort().tolist()],
    "index_select": lambda h, order: h.index_select(0, order.argsort()),
    "gather": lambda h, order: h.gather(-2, _column(order.argsort(), h)),
    "take_along_dim": lambda h, order: h.take_along_dim(_column(order.argsort(), h), 0),
    "embedding": lambda h, order: F.embedding(order.argsort(), h),
    "assignment": _written_back,
    "index_copy": lambda h, order: torch.zeros_like(h).index_copy(0, order, h),
    "index_add": lambda h, order: torch.zeros_like(h).index_add(0, order, h),
    "scatter": lambda h, order: torch.zeros_like(h).scatter(0, _column(order, h), h),
    "one by one": _one_by_one,
    "iteration": lambda h, order: torch.stack([list(h)[i] for i in order.argsort().tolist()]),
    "split": lambda h, order: torch.cat([h.split(1)[i] for i in order.argsort().tolist()]),
    "permutation matrix": lambda h, order: torch.eye(len(h), dtype=h.dtype)[order.argsort()] @ h,
}


class Reordered(nn.Module):
    """Layers see the examples in an order of their own, by length, which is undone."""

    def __init__(self, undo: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.undo = nn.Linear(108, 5), nn.Linear(5, C, bias=False), undo

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        order = x[:, 0].argsort()
        return self.undo(self.b(torch.tanh(self.a(x[order]))), order)


@pytest.mark.parametrize("name", UNDONE)
def test_examples_in_another_order_inside(name: str) -> None:
    """Also where that depends on the examples, and the first batch has them in order, or of one class."""
    (x, y), model = batch(), network(lambda: Reordered(UNDONE[name]))
    in_order, one_class = x[x[:, 0, 0, 0].argsort()], torch.zeros_like(y)
    for inputs, labels in ((in_order, one_class), (x, one_class), (in_order, y), (x, y)):
        expected = vjp_pass(model, inputs, labels, C).class_gradients
        found = split_pass(model, inputs, labels, C).class_gradients, class_gradients(model, inputs, labels, C)[0]
        for c in found:
            torch.testing.assert_close(c, expected, rtol=0, atol=1e-12)


ALWAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "flip": (lambda x: x.flip(0), lambda h: h.flip(0)),
    "roll": (lambda x: x.roll(1, 0), lambda h: h.roll(-1, 0)),
    "halves": (lambda x: torch.cat([x[6:], x[:6]]), lambda h: torch.cat([h[6:], h[:6]])),
    "transposes": (
        lambda x: x.unflatten(0, (3, 4)).transpose(0, 1).flatten(0, 1),
        lambda h: h.unflatten(0, (4, 3)).transpose(0, 1).flatten(0, 1),
    ),
}


class Displaced(nn.Module):
    """The same order for every batch; ``closed``: a head of zeros, through which no gradient comes."""

    def __init__(self, name: str, closed: bool) -> None:
        super().__init__()
        self.a, self.b, self.name = nn.Linear(108, 5), nn.Linear(5, C), name
        if closed:
            nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        do, undo = ALWAYS[self.name]
        x = do(x) if len(x) == N else x
        h = torch.tanh(self.a(x.flatten(1)))
        return self.b(undo(h) if len(x) == N else h)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", ALWAYS)
def test_examples_in_one_other_order_inside(name: str, closed: bool) -> None:
    (x, y), model = batch(), network(lambda: Displaced(name, closed))
    one_class = torch.zeros_like(y)
    for opened in (False, True):
        if opened:
            nn.init.ones_(model.b.weight)
        for labels in (one_class, y):
            expected = vjp_pass(model, x, labels, C).class_gradients
            found = split_pass(model, x, labels, C).class_gradients, class_gradients(model, x, labels, C)[0]
            for c in found:
                torch.testing.assert_close(c, expected, rtol=0, atol=1e-12)


WITHIN: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda h: h[:, torch.tensor([4, 0, 2, 1, 3])],
    "last ones": lambda h: h[torch.arange(N), :, None].repeat(1, 1, 2)[torch.arange(N), :, torch.arange(N) % 2],
    "sorted features": lambda h: h.sort(-1)[0].flip(1).roll(2, 1),
    "masked": lambda h: h.index_put((h[:, 0] > 0,), torch.zeros((), dtype=h.dtype)),
    "slices": lambda h: torch.cat([h[:, 1:], h[:N, :1]], 1) + h[..., 0, None],
    "heads": lambda h: torch.stack([h, h], 1).permute(1, 0, 2)[0],
}


@pytest.mark.parametrize("name", WITHIN)
def test_what_moves_within_the_examples_only(name: str) -> None:
    (x, _), layer = batch(), nn.Linear(108, 5).double()
    assert not moves_examples(WITHIN[name](layer(x.flatten(1))), N)
