"""Steps split by a span against dense algebra; limits of stability by iterating; branches that only switch the rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvspace import Objective
from curvspace.optim.span import identity_span
from papers.common.style import Style
from papers.race import figures_dynamics as figures
from papers.race import measures_dynamics as dynamics
from papers.race.measures_why import resumed


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_momentum_is_stable_up_to_the_limit_and_not_beyond(beta, nesterov):
    limit = dynamics.stability_limit({"momentum": beta, "nesterov": nesterov})
    for factor, stays in ((0.99, True), (1.01, False)):
        x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=factor * limit, momentum=beta, nesterov=nesterov)
        for _ in range(3000):
            optimizer.zero_grad()
            (x.square() / 2).sum().backward()
            optimizer.step()
        assert (abs(float(x.detach())) < 1) == stays
    assert dynamics.stability_limit({"lr": 0.1}) != dynamics.stability_limit({"lr": 0.1})  # NaN: Adam has no such limit


def test_a_step_is_split_as_dense_algebra_splits_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
    objective = Objective(model, [batch])
    size = sum(p.numel() for p in model.parameters())
    q = torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64))[0]
    d = 1e-3 * torch.randn(size, dtype=torch.float64)
    hessian = objective.hessian()
    dense = torch.stack([hessian @ e for e in torch.eye(size, dtype=torch.float64)])
    gradient, inner = objective.gradient(), q @ (q.T @ d)
    found = dynamics.second_order(identity_span(q.T.contiguous()), d, gradient, hessian, hessian @ d)
    assert found["inside"] == pytest.approx(float(gradient @ inner + inner @ dense @ inner / 2), rel=1e-10)
    assert found["across"] == pytest.approx(float((d - inner) @ dense @ inner), rel=1e-8, abs=1e-18)
    before = objective.loss()
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(model.parameters()) + d, model.parameters()
        )
    assert sum(found.values()) == pytest.approx(objective.loss() - before, rel=1e-3)


def test_signal_and_noise_are_those_of_the_draws():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, 4.0], dtype=torch.float64)
    first, second = (mean + 2 * torch.randn(40_000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    found = dynamics.signal_and_noise(first, second)
    assert found["signal"] == pytest.approx(25, rel=0.02)
    assert found["noise"] == pytest.approx(8, rel=0.05)
    assert abs(found["autocorrelation"]) < 0.02
    sides = mean * torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)[:, None]
    assert dynamics.signal_and_noise(sides, sides)["autocorrelation"] == pytest.approx(-1.0)


def test_windows_follow_the_run_and_their_gain_is_the_loss_at_the_mean(context):
    table = dynamics.windows(context, starts=[2], steps=3, examples=20)
    assert table["span"].tolist() == 2 * ["class gradients", "mean directions", "random"]
    assert (table["noise"] + table["signal"] > 0).all()
    whole = table["inside"] + table["outside"] + table["across"]
    assert whole.to_numpy() == pytest.approx(table["change"].to_numpy(), rel=0.3)
    at = resumed(context, context.runs[0], 2)
    batch = at.data.normalise(at.data.train.inputs[:20]), at.data.train.targets[:20]
    path = []
    for i in range(3):
        at.step(i)
        path.append(torch.nn.utils.parameters_to_vector(at.model.parameters()).detach().clone())
    objective = Objective(at.model, [batch])
    ends = objective.loss()
    torch.nn.utils.vector_to_parameters(torch.stack(path).mean(0), at.model.parameters())
    assert table["loss"].iloc[0] == pytest.approx(ends)
    assert table["gain_whole"].iloc[0] == pytest.approx(ends - objective.loss(), abs=1e-7)
    figure, drawn = figures.windows({"windows": table}, Style())
    assert len(figure.axes) == 12
    assert len(drawn) == 6


def test_a_switch_to_the_same_rule_changes_nothing_and_momentum_is_taken_along(context):
    sgd = {"kind": "sgd", "momentum": 0.9, "nesterov": True}
    blocks = {"nesterov": sgd, "twin": sgd, "plain": {"kind": "sgd"}}
    table = dynamics.switched(context, [2], steps=4, every=2, examples=20, optimizers=blocks)
    own = table[table["optimizer"] == "nesterov"].set_index(["then", "after"])
    assert own.loc["twin", "loss"].tolist() == own.loc["nesterov", "loss"].tolist()
    assert own.loc[("plain", 0), "loss"] == own.loc[("nesterov", 0), "loss"]
    assert own.loc[("plain", 4), "loss"] != own.loc[("nesterov", 4), "loss"]
    figure, _ = figures.switched({"switched": table}, Style())
    assert len(figure.axes) == 1
