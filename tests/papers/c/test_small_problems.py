"""The small problems and batched solvers against finite differences, torch, and the library's own optimisers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from curvspace.optim.curveball import CurveBall
from curvspace.optim.levenberg_marquardt import LevenbergMarquardt
from papers.c import small_solvers
from papers.c.small_problems import PROBLEMS, Rosenbrock, TwoLayerLinear, build_problem


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_equal_finite_differences(name):
    rng = np.random.default_rng(0)
    problem = build_problem(name, 3, rng)
    w, noise = problem.starts(3, rng), problem.draw(3, rng)
    jacobian, gradient = problem.jacobian(w, noise), problem.gradient(w, noise)
    for i in range(w.shape[1]):
        e = 1e-6 * np.eye(w.shape[1])[i]
        numeric = (problem.residuals(w + e, noise) - problem.residuals(w - e, noise)) / 2e-6
        np.testing.assert_allclose(jacobian[:, :, i], numeric, atol=1e-6)
    np.testing.assert_allclose(gradient, 2 * np.einsum("bmp,bm->bp", jacobian, problem.residuals(w, noise)), atol=1e-10)


def test_two_layer_residuals_are_the_mean_squared_error_of_the_sample():
    rng = np.random.default_rng(1)
    problem = TwoLayerLinear.sample(2, rng, inputs=3, hidden=2, outputs=4, examples=50)
    replay = np.random.default_rng(1)
    left = np.linalg.qr(replay.standard_normal((2, 4, 3)))[0]
    right = np.linalg.qr(replay.standard_normal((2, 3, 3)))[0]
    matrix = left * np.linspace(1, 1e-5, 3) @ right
    assert np.linalg.cond(matrix[0]) == pytest.approx(1e5, rel=1e-6)
    x = replay.standard_normal((2, 50, 3))
    w = problem.starts(2, rng)
    for run in range(2):
        first, second = w[run, :8].reshape(4, 2), w[run, 8:].reshape(2, 3)
        direct = (((first @ second - matrix[run]) @ x[run].T) ** 2).sum(0).mean()
        assert problem.objective(w)[run] == pytest.approx(direct)


class AsModel(nn.Module):
    """Rosenbrock's residuals as the outputs of a network with one weight vector."""

    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, noise):
        u, v = self.w
        return torch.stack([(1 - u).expand(1), 10 * noise.sqrt() * (v - u**2)], dim=1)


@pytest.mark.parametrize(
    ("solver", "settings", "optimizer"),
    [
        ("curveball", {"damping": 1.0}, lambda m, f: CurveBall(m, loss=f, damping=1.0)),
        (
            "levenberg-marquardt",
            {"damping": 1.0, "factor": 2.0},
            lambda m, f: LevenbergMarquardt(m, loss=f, damping=1.0, up=2.0, down=0.5),
        ),
        ("sgd", {"lr": 1e-3, "momentum": 0.9}, None),
        ("adam", {"lr": 0.1, "beta2": 0.99}, None),
    ],
)
def test_batched_solvers_take_the_steps_of_the_optimisers(solver, settings, optimizer):
    rng = np.random.default_rng(2)
    problem = Rosenbrock(0.1, 2.0)
    w = problem.starts(2, rng)
    model = AsModel(w[1])

    def loss(outputs, targets):
        return outputs.square().sum()

    if solver == "sgd":  # torch multiplies by lr when the step is taken: the same for a constant lr
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    elif solver == "adam":
        opt = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 0.99))
    else:
        opt = optimizer(model, loss)
    method = small_solvers.SOLVERS[solver](w, {name: np.full(2, value) for name, value in settings.items()})
    for _ in range(12):
        noise = problem.draw(2, rng)
        w = method.step(problem, w, noise)
        x = torch.tensor(noise[1:])
        if isinstance(opt, CurveBall | LevenbergMarquardt):
            opt.step(x, torch.zeros(1))
        else:
            opt.zero_grad()
            loss(model(x), None).backward()
            opt.step()
        np.testing.assert_allclose(model.w.detach().numpy(), w[1], rtol=1e-7, atol=1e-9)


def test_runs_do_not_depend_on_their_neighbours():
    rng = np.random.default_rng(3)
    problem = build_problem("Rahimi-Recht", 4, rng)
    start = problem.starts(4, rng)
    settings = {"damping": np.ones(4)}
    together = small_solvers.solve("curveball", problem, start, settings, rng, 1e-4, 300)
    for run in range(4):
        part = np.array([run])
        alone = small_solvers.solve(
            "curveball", problem.take(part), start[part], {"damping": np.ones(1)}, rng, 1e-4, 300
        )
        assert alone[0] == together[run]


def test_diverging_and_late_runs_are_not_counted():
    rng = np.random.default_rng(4)
    problem = Rosenbrock()
    start = np.array([[1.0, 1.0], [-1.2, 1.0], [-1.2, 1.0]])
    settings = {"lr": np.array([1e-3, 10.0, 1e-9]), "momentum": np.array([0.9, 0.9, 0.0])}
    counts = small_solvers.solve("sgd", problem, start, settings, rng, 1e-4, 50)
    assert counts[0] == 0
    assert np.isnan(counts[1:]).all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_bfgs_reaches_the_tolerance_where_it_says_so(name):
    rng = np.random.default_rng(5)
    problem = build_problem(name, 1, rng)
    path: list[np.ndarray] = []
    count = small_solvers.bfgs(problem, problem.starts(1, rng), rng, 1e-4, 500, path)
    assert problem.objective(path[-1])[0] < 1e-4 <= problem.objective(path[-2])[0]
    assert len(path) - 1 == count <= 500
