"""Scans, fits and line searches against functions whose shape along a line is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvspace import Objective
from curvspace.landscape import LossScanner, fit_quadratic, line_search, plane_through, search_grid


class Point(nn.Module):
    """The parameters themselves as outputs, so that the loss is any function of them."""

    def __init__(self, *values: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(x.shape[0], -1)


def scanner_of(function, *values: float) -> LossScanner:
    x = torch.zeros(2, 1, dtype=torch.float64)
    return LossScanner(Objective(Point(*values), [(x, x)], lambda z, _: function(z[0])))


def axis(i: int, size: int = 2) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[i]


def bowl(z: Tensor) -> Tensor:
    return 0.5 * (8.0 * z[0] ** 2 + 0.5 * z[1] ** 2)


@pytest.mark.parametrize(("method", "chunk"), [("loop", 1), ("vmap", 3)])
def test_scan_of_a_network_on_ragged_batches(method, chunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 16, 3)).double()
    batches = [(torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (5, 2)]
    objective = Objective(model, batches)
    direction = torch.randn(objective.num_parameters, dtype=torch.float64)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    t = [-0.5, 0.0, 0.3, 1.0]
    found = LossScanner(objective, method, chunk).along(direction, t)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    for value, loss in zip(t, found, strict=True):
        nn.utils.vector_to_parameters(before + value * direction, model.parameters())
        with torch.no_grad():
            assert loss == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-12)


def test_evaluations_are_counted():
    scanner = scanner_of(bowl, 1.0, 1.0)
    start = scanner.evaluations
    scanner.along(axis(0), [0.1, 0.2, 0.3])
    assert scanner.evaluations - start == 3
    assert scanner.evaluations_per_second > 0


def test_float32_rounding_stays_below_the_stated_resolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 4))
    x, y = torch.randn(300, 10), torch.randint(0, 4, (300,))
    single, double = LossScanner(Objective(model, [(x, y)])), LossScanner(Objective(model.double(), [(x.double(), y)]))
    direction = torch.randn(single.origin.shape[0]) / single.origin.shape[0] ** 0.5
    t = np.linspace(-1, 1, 9)
    error = np.abs(single.along(direction, t) - double.along(direction.double(), t))
    assert error.max() < 5 * single.resolution


@pytest.mark.parametrize("radius", [1e-3, 1.0, 100.0])
def test_fit_of_a_parabola_gives_its_curvature_and_slope(radius):
    fit = fit_quadratic(scanner_of(bowl, 0.3, 2.0), axis(0), radius)
    assert (fit.curvature, fit.slope) == (pytest.approx(8.0, rel=1e-6), pytest.approx(2.4, rel=1e-6))
    assert fit.resolved


def test_a_fit_below_rounding_is_not_resolved():
    assert not fit_quadratic(scanner_of(bowl, 0.3, 2.0), axis(0), 1e-9).resolved
    assert not fit_quadratic(scanner_of(bowl, 0.3, 2.0), axis(0), 0.0).resolved


def test_best_step_on_a_quadratic_is_one_over_the_curvature():
    for i, curvature, place in ((0, 8.0, 0.3), (1, 0.5, 2.0)):
        slope = curvature * place
        found = line_search(scanner_of(bowl, 0.3, 2.0), axis(i), radius=5.0)
        assert -slope / found.t == pytest.approx(curvature, rel=1e-3)
        assert found.improvement == pytest.approx(slope**2 / (2 * curvature), rel=1e-5)
        assert found.improves
        assert not found.at_edge


def test_the_global_minimum_is_found_beyond_a_nearer_local_one():
    def wells(z: Tensor) -> Tensor:  # minima near -0.1 (shallow) and +2 (deep), a hill between
        return -0.2 * torch.exp(-((z[0] + 0.1) ** 2) / 0.01) - torch.exp(-((z[0] - 2.0) ** 2) / 0.1)

    found = line_search(scanner_of(wells, 0.0, 0.0), axis(0), radius=4.0, points=40)
    assert found.t == pytest.approx(2.0, abs=1e-2)


def test_a_direction_that_improves_nowhere_says_so():
    found = line_search(scanner_of(bowl, 0.0, 0.0), axis(0), radius=2.0)
    assert (found.t, found.improvement, found.improves) == (0.0, 0.0, False)


def test_a_minimum_outside_the_range_is_marked():
    found = line_search(scanner_of(bowl, 10.0, 0.0), axis(0), radius=1.0)
    assert found.at_edge
    assert found.t == -1.0


def test_grid_is_symmetric_and_bad_ranges_are_refused():
    grid = search_grid(2.0, 5, 1e-3)
    np.testing.assert_allclose(grid, -grid[::-1])
    assert (grid[0], grid[5], grid[6]) == (-2.0, 0.0, pytest.approx(1e-3))
    with pytest.raises(ValueError, match="smallest"):
        line_search(scanner_of(bowl, 1.0, 0.0), axis(0), radius=1e-5)
    with pytest.raises(ValueError, match="method"):
        LossScanner(Objective(Point(1.0), [(torch.zeros(1, 1), torch.zeros(1, 1))], lambda z, _: z.sum()), "fast")


def test_losses_on_a_plane():
    scanner = scanner_of(bowl, 0.5, -1.0)
    s, t = [-0.5, 0.0, 0.25], [0.0, 1.0]
    expected = [[bowl(torch.tensor([0.5 + a, -1.0 + b])) for b in t] for a in s]
    np.testing.assert_allclose(scanner.plane(axis(0), axis(1), s, t), expected, rtol=1e-6)


def test_plane_through_three_points():
    torch.manual_seed(0)
    points = torch.randn(3, 7).double()
    u, v, coordinates = plane_through(points)
    torch.testing.assert_close(points[0] + coordinates @ torch.stack([u, v]), points)
    torch.testing.assert_close(torch.stack([u, v]) @ torch.stack([u, v]).T, torch.eye(2).double())
    assert coordinates[1, 1] == 0
    with pytest.raises(ValueError, match="lie on one line"):
        plane_through(torch.stack([points[0], points[1], 2 * points[1] - points[0]]))


def test_losses_that_read_parameters_or_hold_tensors_of_the_networks_type():
    torch.manual_seed(0)
    model, x, y, weight = nn.Linear(4, 3), torch.randn(9, 4), torch.randint(3, (9,)), torch.tensor([1.0, 2.0, 3.0])

    def loss(z, y):
        return nn.functional.cross_entropy(z, y, weight) + model.weight.square().sum()

    scanner = LossScanner(Objective(model, (x, y), loss))
    direction = torch.ones(15)
    there = scanner.along(direction, [0.1])[0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert there == pytest.approx(loss(model(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, -3.0, -1000.0])
def test_what_is_rounding_below_zero_too(offset):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    loss = lambda z, t: nn.functional.cross_entropy(z, t) + offset  # noqa: E731
    scanner = LossScanner(Objective(model, (x, y), loss))
    direction = torch.zeros_like(scanner.origin)
    direction[-3:] = 3**-0.5  # a constant that is added to all logits changes nothing
    assert not line_search(scanner, direction, 1.0).improves


@pytest.mark.parametrize("shift", [-0.5, -1e3])
def test_a_loss_that_is_no_number_at_the_origin(shift):
    model = nn.Linear(4, 3)
    objective = Objective(
        model, (torch.ones(5, 4), torch.arange(5) % 3), lambda z, t: (z.square().mean() * 0 + shift).log()
    )
    scanner = LossScanner(objective)
    direction = torch.ones_like(scanner.origin) / 15**0.5
    with pytest.raises(ValueError, match="needs a finite loss"):
        line_search(scanner, direction, 1.0)
    assert not fit_quadratic(scanner, direction, 1.0).resolved


def test_what_vmap_cannot_do_is_said():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match='vmap cannot evaluate Sequential: take method="loop"'):
        LossScanner(Objective(model, (torch.randn(5, 4), torch.arange(5) % 3)), "vmap")


def test_a_direction_of_another_length():
    scanner = LossScanner(Objective(nn.Linear(4, 3), (torch.randn(5, 4), torch.arange(5) % 3)))
    with pytest.raises(ValueError, match=r"must have shape \(15,\)"):
        scanner.along(torch.ones(14), [0.0])


@pytest.mark.parametrize("method", ["loop", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_directions_of_any_real_type(dtype, method):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    objective = Objective(model, [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))])
    direction = torch.arange(8).to(dtype)
    expected = LossScanner(objective, method).along(direction.float(), [0.5])
    assert LossScanner(objective, method).along(direction, [0.5]) == expected


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: fit_quadratic(s, axis(0), 1.0, points=2), "at least 3 points, got 2"),
        (lambda s: fit_quadratic(s, axis(0), -1.0), "radius"),
        (lambda s: line_search(s, axis(0), 1.0, points=1), "at least 2 points"),
        (lambda s: line_search(s, axis(0) * torch.nan, 1.0), "not a number wherever"),
        (lambda s: s.along(axis(0), np.zeros((2, 2))), r"one or more numbers \(m,\), got shape \(2, 2\)"),
        (lambda s: s.along(axis(0), []), "one or more numbers"),
        (lambda s: s.along(axis(0).to(torch.complex128), [1.0]), "real"),
        (lambda s: s.plane(axis(0, 1), axis(1), [0.0], [0.0]), "shape"),
        (lambda s: LossScanner(s.objective, "vmap", 0), "chunk"),
        (lambda s: plane_through(torch.eye(2)), "three points"),
        (lambda s: plane_through(torch.full((3, 4), torch.nan)), "not finite"),
    ],
)
def test_what_would_be_another_answer_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(scanner_of(bowl, 1.0, 1.0))
