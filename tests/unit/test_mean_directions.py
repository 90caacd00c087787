"""Mean directions in closed form against dense projections."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvspace.functional import parameter_vector, trainable_parameters
from curvspace.optim import (
    ClassGradients,
    Drop,
    GradientDescent,
    Joint,
    MeanDirections,
    RayleighRitzNewton,
    Scale,
    SpanFilter,
    SubspaceNewton,
)
from curvspace.optim.mean_directions import joint_span, mean_span, transposed_groups
from curvspace.optim.span import orthonormal_span
from tests.unit.small_networks import C, batches, small_network

SHAPES = [(4, 3, 2, 2), (4,), (5, 6), (5, 1), (2, 3, 4), (), (3, 1, 2)]


def dense(shapes: list[tuple[int, ...]]) -> torch.Tensor:
    """One column a unit, written entry by entry."""
    total = sum(torch.Size(s).numel() for s in shapes)
    columns, start = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        if len(shape) >= 2 and size > shape[0]:
            for unit in range(shape[0]):
                marked = torch.zeros(shape, dtype=torch.float64)
                marked[unit] = 1.0
                column = torch.zeros(total, dtype=torch.float64)
                column[start : start + size] = marked.flatten() / marked.norm()
                columns.append(column)
        start += size
    return torch.stack(columns, 1)


def test_closed_form_is_the_dense_span() -> None:
    span, Q = mean_span(SHAPES), dense(SHAPES)
    torch.manual_seed(0)
    v, s = torch.randn(len(Q), dtype=torch.float64), torch.randn(Q.shape[1], dtype=torch.float64)
    assert span.size == Q.shape[1] == 4 + 5 + 2 + 3
    torch.testing.assert_close(span.matrix(), Q)
    torch.testing.assert_close(span.coordinates(v), Q.T @ v)
    torch.testing.assert_close(span.combine(s), Q @ s)
    torch.testing.assert_close(span.reject(v), v - Q @ (Q.T @ v))


TRANSPOSED = {
    "plain": nn.ConvTranspose2d(3, 4, 2),
    "grouped": nn.ConvTranspose1d(6, 4, 3, groups=2),
    "each channel alone": nn.ConvTranspose2d(4, 4, 3, groups=4),
    "one entry a unit": nn.ConvTranspose1d(2, 2, 1, groups=2),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 2)),
    "grouped convolution": nn.Conv2d(4, 6, 2, groups=2),
}


def weights_of_a_unit(layer: nn.Module, unit: int) -> torch.Tensor:
    """Which entries of the kernel the output channel depends on, found by differentiation."""
    x = torch.rand(1, layer.in_channels, *[5] * (layer.weight.ndim - 2)) + 1.0
    (gradient,) = torch.autograd.grad(layer(x)[0, unit].sum(), layer.weight)
    return gradient.abs() > 1e-4


@pytest.mark.parametrize("name", TRANSPOSED)
def test_units_of_convolutions_are_those_of_their_outputs(name: str) -> None:
    layer = TRANSPOSED[name]
    plain = TRANSPOSED["plain"] if name == "weight norm" else layer
    kernel = max(layer.parameters(), key=lambda p: p.numel())
    groups = transposed_groups(layer).get(kernel, 0)
    span = mean_span([kernel.shape], [groups])
    columns = [weights_of_a_unit(plain, unit).double().flatten() for unit in range(layer.out_channels)]
    Q = torch.stack([c / c.norm() for c in columns if c.sum() > 1] or [torch.zeros(kernel.numel()).double()], 1)
    v = torch.randn(2, kernel.numel(), dtype=torch.float64)
    expected = v - v @ Q @ Q.T
    torch.testing.assert_close(span.reject(v), expected)
    torch.testing.assert_close(v[0] - span.combine(span.coordinates(v[0])), expected[0])
    for spans in ("mean-directions", ("mean-directions", "past-updates")):  # tensor by tensor, and as one vector
        filtered = SpanFilter(torch.optim.SGD([kernel], lr=0.1), layer, spans=spans)
        kernel.grad = v[0].view(kernel.shape).float()
        filtered.filter()
        torch.testing.assert_close(kernel.grad.flatten().double(), expected[0], rtol=0, atol=1e-6)


def test_the_sum_with_other_directions_is_the_dense_sum() -> None:
    Q = dense(SHAPES)
    torch.manual_seed(1)
    rows = torch.randn(3, len(Q), dtype=torch.float64) + 3.0
    v = torch.randn(len(Q), dtype=torch.float64)
    whole = torch.linalg.qr(torch.cat([Q, rows.T], 1))[0]
    for order in ([mean_span(SHAPES), orthonormal_span([rows])], [orthonormal_span([rows]), mean_span(SHAPES)]):
        span = joint_span(order)
        assert span.size == whole.shape[1]
        basis = span.matrix()
        torch.testing.assert_close(basis.T @ basis, torch.eye(span.size, dtype=torch.float64), rtol=0, atol=1e-10)
        torch.testing.assert_close(span.reject(v), v - whole @ (whole.T @ v))
        torch.testing.assert_close(span.combine(span.coordinates(v)), whole @ (whole.T @ v))
        torch.testing.assert_close(span.coordinates(v), basis.T @ v)
    inside = joint_span([mean_span(SHAPES), orthonormal_span([Q.T[:2].contiguous()])])  # nothing new in these
    torch.testing.assert_close(inside.reject(v), v - Q @ (Q.T @ v))


def test_thousands_of_units_take_no_matrix() -> None:
    span = mean_span([(4000, 3, 3), (6000, 20)])
    v = torch.randn(4000 * 9 + 6000 * 20)
    assert span.size == 10_000
    rest = span.reject(v)
    assert float(span.coordinates(rest).abs().max()) < 1e-4
    torch.testing.assert_close(rest + span.combine(span.coordinates(v)), v, rtol=0, atol=1e-5)


def test_in_the_split_step() -> None:
    """Equal multiples on both sides cancel to gradient descent; alone and joined with the class gradients."""
    for basis in (MeanDirections(), Joint([ClassGradients(0.5, orthonormal=True), MeanDirections()])):
        model, plain = small_network(), small_network()
        optimizer = SubspaceNewton(model, basis, Scale(), GradientDescent(0.2))
        reference = torch.optim.SGD(plain.parameters(), lr=0.2)
        for x, y in batches(3):
            reference.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            reference.step()
            optimizer.step(x, y)
        torch.testing.assert_close(parameter_vector(model), parameter_vector(plain), rtol=0, atol=1e-10)
        units = sum(len(p) for p in trainable_parameters(model).values() if p.ndim > 1)
        assert basis.span.size == units + (C if isinstance(basis, Joint) else 0)


def test_a_rule_that_needs_a_matrix_is_refused() -> None:
    optimizer = SubspaceNewton(small_network(), MeanDirections(), RayleighRitzNewton(), Drop())
    with pytest.raises(ValueError, match="mean directions have no matrix"):
        optimizer.step(*batches(1)[0])
