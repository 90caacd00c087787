"""Class gradients by every method against one backward pass per class, and the fused passes of the optimisers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import class_gradients
from curvspace.curvature import cross_class_gradients
from curvspace.curvature.class_gradients import split_pass, vjp_pass

C = 4


def _network(norm: bool) -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3), *([nn.BatchNorm2d(3)] if norm else []), nn.ReLU(), nn.Flatten(), nn.Linear(48, C)]
    torch.manual_seed(0)
    return nn.Sequential(*layers).double()


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(9, 2, 6, 6).double(), torch.tensor([0, 3, 0, 1, 1, 3, 3, 0, 1])  # class 2 is absent


def _naive(model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int, j: int | None = None) -> torch.Tensor:
    mean = model(x)[y == (k if j is None else j), k].mean()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(mean, list(model.parameters()))])


@pytest.mark.parametrize("algorithm", ["auto", "split", "vjp"])
def test_methods_agree_with_one_backward_pass_per_class(algorithm):
    model, (x, y) = _network(False), _batch()
    c, counts = class_gradients(model, x, y, num_classes=C, algorithm=algorithm)
    assert counts.tolist() == [3, 3, 0, 3]
    assert not c[2].any()
    for k in (0, 1, 3):
        torch.testing.assert_close(c[k], _naive(model, x, y, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_batch_statistics(batch_norm):
    model, (x, y) = _network(True), _batch()
    model[1].running_mean.uniform_(-1, 1)
    before = {name: b.clone() for name, b in model.named_buffers()}
    c, _ = class_gradients(model, x, y, C, batch_norm=batch_norm)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    model.train(batch_norm == "batch")
    for k in (0, 1, 3):
        torch.testing.assert_close(c[k], _naive(model, x, y, k), rtol=0, atol=1e-12)
    if batch_norm == "batch":
        with pytest.raises(ValueError, match="not exact with batch statistics"):
            class_gradients(model, x, y, C, algorithm="split", batch_norm=batch_norm)
    else:
        split, _ = class_gradients(model, x, y, C, algorithm="split", batch_norm=batch_norm)
        torch.testing.assert_close(c, split, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fused", "norm"), [(split_pass, False), (vjp_pass, False), (vjp_pass, True)])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_fused_passes(fused, norm, loss):
    model, (x, y) = _network(norm), _batch()
    targets = y if loss == "cross_entropy" else F.one_hot(y, C).double()
    if loss == "mse":
        loss = lambda z, labels: 0.5 * (z - F.one_hot(labels, C)).square().sum(1).mean()  # noqa: E731
    found = fused(model, x, y, C, loss)
    z = model(x)
    value = F.cross_entropy(z, y) if loss == "cross_entropy" else 0.5 * (z - targets).square().sum(1).mean()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))])
    assert float(found.loss) == pytest.approx(value.item(), abs=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.class_gradients[3], _naive(model, x, y, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.probabilities, model(x).softmax(1)[torch.arange(9), y].detach())
    assert found.counts.tolist() == [3, 3, 0, 3]


def test_a_fused_pass_in_training_mode_updates_running_statistics_once():
    model, (x, y) = _network(True).train(), _batch()
    vjp_pass(model, x, y, C)
    assert model[1].num_batches_tracked.item() == 1


@pytest.mark.parametrize("norm", [False, True])
def test_cross_class_gradients_contain_the_class_gradients(norm):
    model, (x, y) = _network(norm), _batch()
    cross, counts = cross_class_gradients(model, x, y, C, batch_norm="batch")
    c, _ = class_gradients(model, x, y, C, batch_norm="batch")
    torch.testing.assert_close(torch.stack([cross[k, k] for k in range(C)]), c, rtol=0, atol=1e-12)
    torch.testing.assert_close(cross[1, 3], _naive(model, x, y, 3, j=1), rtol=0, atol=1e-12)
    assert counts.sum() == 9


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 4]), r"targets must be in 0\.\.3, got 0\.\.4$"),
        (torch.tensor([0, 1, -100]), r"targets must be in 0\.\.3, got -100\.\.1; leave out examples without a class"),
        (torch.tensor([0.0, 1.0, 2.0]), "integer targets"),
        (torch.tensor([0, 1]), "3 inputs has 2 targets"),
    ],
)
def test_bad_targets(y, message):
    with pytest.raises(ValueError, match=message):
        class_gradients(_network(False), torch.randn(3, 2, 6, 6).double(), y, C)


def test_bad_outputs_and_method():
    x, y = _batch()
    with pytest.raises(ValueError, match=r"outputs have shape \(9, 4\); class gradients need \(N, 7\)"):
        class_gradients(_network(False), x, y, 7)
    with pytest.raises(ValueError, match="algorithm must be"):
        class_gradients(_network(False), x, y, C, algorithm="fast")
