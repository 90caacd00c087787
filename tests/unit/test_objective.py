"""An objective's policy of normalisation, dropout and precision, its parameters, and errors that say what and where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.curvature import dense_matrix
from tests.unit.oracles import dense_hessian
from tests.unit.small_networks import Fn, minibatch, mlp


def _norm_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[1].running_mean.uniform_(-1, 1)
    return model


def test_running_statistics_and_modes_are_left_alone():
    model = _norm_network().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for batch_norm in ("batch", "running", None):
        objective = Objective(model, [minibatch()], batch_norm=batch_norm)
        v = torch.ones(objective.num_parameters).double()
        objective.loss(), objective.gradient(), objective.hessian() @ v, objective.gauss_newton() @ v
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_batch_norm_chooses_the_statistics():
    model, batch = _norm_network(), minibatch()
    loss = {batch_norm: Objective(model, [batch], batch_norm=batch_norm).loss() for batch_norm in ("batch", "running")}
    assert abs(loss["batch"] - loss["running"]) > 1e-3
    assert Objective(model.train(), [batch]).loss() == loss["batch"]
    assert Objective(model.eval(), [batch]).loss() == loss["running"]
    assert Objective(model, [batch], batch_norm="batch").policy == {"batch_norm": "batch", "dropout": "off"}
    with pytest.raises(ValueError, match="batch_norm must be"):
        Objective(model, [batch], batch_norm="train")


def test_dropout_is_off_or_fixed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    batches = [minibatch()]
    off = Objective(model, batches)
    assert off.loss() == Objective(model.eval(), batches).loss()
    seeded = Objective(model, batches, dropout_seed=3)
    assert seeded.loss() == seeded.loss() != off.loss()
    H = seeded.hessian()
    v = torch.randn(H.shape[0]).double()
    recomputed = Objective(model, batches, dropout_seed=3, engine="recompute").hessian()
    torch.testing.assert_close(H @ v, recomputed @ v, rtol=0, atol=1e-14)
    state = torch.random.get_rng_state()
    seeded.gradient()
    assert torch.equal(state, torch.random.get_rng_state())


def test_operators_are_taken_at_the_parameters_of_their_construction():
    model = mlp()
    H = Objective(model, [minibatch()], engine="recompute").hessian()
    v = torch.ones(H.shape[0]).double()
    before = H @ v
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(H @ v, before)


def test_double_precision_on_request():
    model = mlp().float()
    x, y = minibatch()
    H = Objective(model, [(x.float(), y)], dtype=torch.float64).hessian()
    assert H.dtype == torch.float64
    expected = dense_hessian(model.double(), [(x.float().double(), y)], "cross_entropy")
    torch.testing.assert_close(dense_matrix(H), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("microbatch", [1, 5, None, "auto"])
def test_microbatches_change_nothing(microbatch):
    model, (x, y) = mlp(), minibatch(600)
    whole = Objective(model, [(x, y)], microbatch=None)
    ragged = Objective(model, [(x[:500], y[:500]), (x[500:], y[500:])], microbatch=microbatch)
    v = torch.randn(whole.num_parameters).double()
    assert ragged.loss() == pytest.approx(whole.loss(), abs=1e-13)
    torch.testing.assert_close(ragged.gradient(), whole.gradient(), rtol=0, atol=1e-13)
    torch.testing.assert_close(ragged.hessian() @ v, whole.hessian() @ v, rtol=0, atol=1e-13)
    torch.testing.assert_close(ragged.gauss_newton() @ v, whole.gauss_newton() @ v, rtol=0, atol=1e-13)


def test_auto_cuts_large_batches_for_the_cache_but_never_batch_statistics():
    network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 32 * 32, 3))
    x, y = torch.randn(512, 1, 32, 32), torch.randint(3, (512,))
    sizes = [b.size for b in Objective(network, [(x, y)]).batches]
    assert max(sizes) < 512
    assert sum(sizes) == 512
    big = (torch.randn(600, 4).double(), torch.randint(3, (600,)))
    assert len(Objective(_norm_network(), [big], batch_norm="batch").batches) == 1
    with pytest.raises(ValueError, match="microbatch would change batch statistics"):
        Objective(_norm_network(), [big], batch_norm="batch", microbatch=100)


def _all_frozen() -> nn.Module:
    return nn.Linear(4, 3).double().requires_grad_(False)


def _noisy() -> nn.Module:
    return Fn(lambda s, x: s.h(x) + torch.randn(3), h=nn.Linear(4, 3)).double()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: Objective(_all_frozen(), [(x, y)]), ValueError, "no parameter with requires_grad=True"),
        (lambda x, y: Objective(mlp(), []), ValueError, "at least one batch"),
        (lambda x, y: Objective(mlp(), [(x, y), (x, y[:5])]), ValueError, "batch 1 has 12 inputs but 5 targets"),
        (lambda x, y: Objective(mlp(), [(x[:0], y[:0])]), ValueError, "batch 0 is empty"),
        (lambda x, y: Objective(mlp(), [(x, y)], "hinge"), ValueError, "unknown loss 'hinge'"),
        (lambda x, y: Objective(mlp(), [(x, y)], engine="fast").hessian(), ValueError, "engine must be"),
        (lambda x, y: Objective(mlp(), [(x, y + 9)]).loss(), ValueError, "batch 0: the loss cross_entropy failed"),
        (lambda x, y: Objective(mlp(), [(x, y)], "mse").loss(), ValueError, r"mse needs targets of shape \(12, 3\)"),
        (lambda x, y: Objective(mlp(), [(x / 0, y)]).gradient(), ValueError, "batch 0: the loss is nan"),
        (lambda x, y: Objective(_noisy(), [(x, y)]).hessian(), RuntimeError, "Fn is not deterministic"),
        (
            lambda x, y: Objective(mlp(), [(x, y)]).hessian() @ torch.ones(5).double(),
            ValueError,
            r"Hessian of shape \(43, 43\) cannot multiply a tensor of shape \(5,\)",
        ),
        (lambda x, y: dense_matrix(Objective(mlp(), [(x, y)]).hessian(), limit=42), ValueError, "P = 43 is above"),
    ],
)
def test_bad_input_is_one_line_that_says_what_and_where(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make(*minibatch())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_a_loss_that_is_nan_in_the_second_batch(kind):
    x, y = minibatch()
    operator = getattr(Objective(mlp(), [(x, y), (x * float("inf"), y)]), kind)()
    with pytest.raises(ValueError, match="batch 1: the loss is nan"):
        operator @ torch.ones(43).double()


def test_old_and_unknown_options():
    batch = minibatch()
    with pytest.raises(ValueError, match="state='batch' is now batch_norm"):
        Objective(mlp(), batch, state="batch")
    with pytest.raises(ValueError, match="method='vjp' is now algorithm"):
        class_gradients(mlp(), *batch, 3, method="vjp")
    with pytest.raises(TypeError, match="Objective has no option 'engines'"):
        Objective(mlp(), batch, engines="auto")


@pytest.mark.parametrize("change", [lambda m: m[0].weight.requires_grad_(False), lambda m: m.pop(2)])
@pytest.mark.parametrize("use", ["refresh", "loss", "gradient", "num_parameters", "hessian"])
def test_trainable_parameters_that_have_changed_since(change, use):
    model = mlp()
    objective = Objective(model, [minibatch()])
    operator = objective.hessian()
    change(model)
    with pytest.raises(RuntimeError, match=r"'\d.weight'.* is frozen or gone since this objective"):
        getattr(operator if use == "refresh" else objective, use)()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Objective(model, [minibatch()]).gradient().shape == (trainable,)


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(torch.tanh(self.body(self.embed(i))))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("head.*", ["embed.weight", "head.bias"]),
        ("head.weight", ["embed.weight"]),
        (["head.weight", "embed.weight", "body.bias"], ["embed.weight", "body.bias"]),
    ],
)
def test_a_tied_parameter_has_each_of_its_names(names, found):
    batch = torch.arange(7), torch.arange(7)
    model = _Tied()
    assert Objective(model, [batch]).part(names).function.names == found
    assert Objective(model, [batch], parameters=names).function.names == found
    assert Objective(model, [batch], parameters=["head.bias", "body.*"]).part("head.*").function.names == ["head.bias"]
