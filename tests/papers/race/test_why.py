"""Mean directions against a dense projector; branches that end where a run with the same rates ends."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from torch import nn

from curvspace.optim.first_order import FirstOrder
from curvspace.optim.mean_directions import mean_span
from papers.common.style import Style
from papers.race.figures_why import annealed as draw_annealed
from papers.race.figures_why import leads
from papers.race.figures_why import mean_shares as draw_shares
from papers.race.measures_why import _shares, annealed, mean_shares, share


def dense_projector(shapes: list[list[int]]) -> torch.Tensor:
    """P_M written out: for each unit of each weight tensor a block of constants 1/c."""
    blocks = []
    for shape in shapes:
        n = torch.Size(shape).numel()
        c = n // shape[0]
        one = torch.ones(c, c, dtype=torch.float64) / c if len(shape) > 1 else torch.zeros(1, 1, dtype=torch.float64)
        blocks += [one] * shape[0]
    return torch.block_diag(*blocks)


def test_share_is_the_trace_with_the_projector():
    shapes = [[3, 4], [3], [2, 3, 2, 2], [2]]
    projector = dense_projector(shapes)
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(projector), 5, dtype=torch.float64))[0]
    expected = float((q.T @ projector @ q).trace()) / 5
    assert share(mean_span(shapes), q) == pytest.approx(expected, rel=1e-12)
    assert share(mean_span(shapes), projector[:, :1]) == pytest.approx(1.0)


def test_shares_of_a_network_with_constant_inputs_are_one():
    """One constant input for all units: every weight gradient is constant over a unit's inputs."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False).double()
    batch = torch.full((30, 6), 0.7, dtype=torch.float64), torch.arange(30) % 3
    found = {row["quantity"]: row["value"] for row in _shares(model, batch, 3, 2, 1e-6, "cross_entropy")}
    for name in ("gradient", "class gradients", "top of H", "top of G"):
        assert found[name] == pytest.approx(1.0, abs=1e-6)


def test_branches_start_at_the_checkpoints_and_lower_the_noise(context):
    table = annealed(context, steps=6)
    assert table["step"].tolist() == [2, 8, 2, 8]
    ends = [float(run.metrics["val_loss"].dropna().iloc[-1]) for run in context.runs]
    assert table.loc[table["step"] == 8, "val_loss"].tolist() == pytest.approx(ends)
    assert (table["annealed_train_loss"] < table["train_loss"]).all()
    pd.testing.assert_frame_equal(table, annealed(context, steps=6))
    found = leads({"branches": table}, "plain")
    assert found["optimizer"].unique().tolist() == ["nesterov"]
    row, base = (table[(table["optimizer"] == o) & (table["step"] == 8)].iloc[0] for o in ("nesterov", "plain"))
    assert found["annealed_lead"].iloc[1] == pytest.approx(base["annealed_val_loss"] - row["annealed_val_loss"])
    _, drawn = draw_annealed({"branches": table}, Style(), "plain")
    assert len(drawn) == 2


def test_shares_along_training_are_drawn(context):
    table = mean_shares(context, examples=20, k=1, tol=0.1)
    assert table["value"].between(0, 1 + 1e-6).all()
    assert (table["quantity"] == "gradient").sum() == 4
    figure, _ = draw_shares({"shares": table}, Style())
    assert len(figure.axes) == 1


def test_leads_are_paired_by_seed():
    """The reference has no seed 1, an easy one, at this step: it says nothing about the lead."""
    rows = [("sgd", 0, 1.0, 0.9), ("ours", 0, 0.9, 0.85), ("ours", 1, 0.5, 0.4)]
    table = pd.DataFrame(rows, columns=["optimizer", "seed", "val_loss", "annealed_val_loss"])
    found = leads({"branches": table.assign(dataset="d", model="m", step=8)}, "sgd")
    assert found[["lead", "annealed_lead", "surviving"]].iloc[0].tolist() == pytest.approx([0.1, 0.05, 0.5])
    assert len(found) == 1


def test_branches_evaluate_the_weights_that_are_to_be_judged(context, monkeypatch):
    """Of a schedule-free optimiser these are others than those it steps; here, for certainty, zeros."""

    @contextmanager
    def zeros(optimizer):
        kept = [p.detach().clone() for p in optimizer.model.parameters()]
        with torch.no_grad():
            for p in optimizer.model.parameters():
                p.zero_()
            yield
            for p, value in zip(optimizer.model.parameters(), kept, strict=True):
                p.copy_(value)

    plain = annealed(context, steps=3)
    monkeypatch.setattr(FirstOrder, "evaluated", zeros)
    table = annealed(context, steps=3)
    columns = ["val_loss", "train_loss", "annealed_val_loss", "annealed_train_loss"]
    assert table[columns].to_numpy() == pytest.approx(math.log(2), rel=1e-6)
    assert (plain[columns] < 0.69).all(axis=None)
