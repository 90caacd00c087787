"""Classes of optimisers from elsewhere, by name: they step as their own code steps, and a reload continues them."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from curvspace.functional import parameter_vector
from curvspace.optim import FirstOrder, build
from tests.unit.small_networks import C, batches, deep_network, small_network

TORCH = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]
OTHERS = {
    "pytorch_optimizer:SOAP": {"precondition_frequency": 2},
    "pytorch_optimizer:Shampoo": {},
    "pytorch_optimizer:ScheduleFreeAdamW": {},
    "schedulefree:AdamWScheduleFree": {},
    "schedulefree:SGDScheduleFree": {},
    "muon": {"weight_decay": 0.1},
}
KINDS = {**{f"torch.optim:{name}": {} for name in TORCH}, **OTHERS}


def built(kind: str, model: nn.Module) -> FirstOrder:
    package = kind.split(":")[0] if ":" in kind else "pytorch_optimizer"
    pytest.importorskip(package)
    optimizer = build(kind, KINDS[kind], model, C, lr=0.01)
    assert isinstance(optimizer, FirstOrder)
    return optimizer


@pytest.mark.parametrize("name", TORCH)
def test_torchs_classes_step_as_they_do_alone(name: str) -> None:
    ours, plain = deep_network(), deep_network()
    optimizer = built(f"torch.optim:{name}", ours)
    reference = getattr(torch.optim, name)(plain.parameters(), lr=0.01)
    for x, y in batches(4, dtype=torch.float32):
        optimizer.step(x, y)
        reference.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        reference.step()
    assert torch.equal(parameter_vector(ours), parameter_vector(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_continues_bit_for_bit(kind: str) -> None:
    model = deep_network()
    optimizer = built(kind, model)
    steps = batches(9, dtype=torch.float32)
    for x, y in steps[:5]:
        optimizer.step(x, y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = deep_network()
    resumed = built(kind, other)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for x, y in steps[5:]:
        assert torch.equal(optimizer.step(x, y), resumed.step(x, y))
    assert torch.equal(parameter_vector(model), parameter_vector(other))
    assert float(optimizer.step(*steps[0])) < 1.6


def test_a_closure_sees_the_same_minibatch() -> None:
    ours, plain = small_network(), small_network()
    optimizer = build("torch.optim:LBFGS", {"max_iter": 4}, ours, C, lr=0.5)
    reference = torch.optim.LBFGS(plain.parameters(), lr=0.5, max_iter=4)
    for x, y in batches(3):

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            reference.zero_grad()
            loss = nn.functional.cross_entropy(plain(x), y)
            loss.backward()
            return loss

        expected = reference.step(closure)
        assert torch.equal(optimizer.step(x, y), expected.detach())
    assert torch.equal(parameter_vector(ours), parameter_vector(plain))
    assert optimizer.costs.backward > 3


@pytest.mark.parametrize("kind", ["schedulefree:AdamWScheduleFree", "pytorch_optimizer:ScheduleFreeAdamW"])
def test_schedule_free_weights_are_shown_for_evaluation_and_put_back(kind: str) -> None:
    model = deep_network()
    optimizer = built(kind, model)
    for x, y in batches(5, dtype=torch.float32):
        optimizer.step(x, y)
    present = parameter_vector(model)
    beta = optimizer.param_groups[0]["betas"][0]
    z = torch.cat([optimizer.state[p]["z"].flatten() for p in model.parameters()])
    with optimizer.evaluated():
        shown = parameter_vector(model)
    # Schedule-free: y = (1 - beta) z + beta x, gradients are taken at y, x is what is evaluated.
    torch.testing.assert_close(present, (1 - beta) * z + beta * shown, rtol=0, atol=1e-6)
    assert not torch.equal(present, shown)
    assert torch.equal(parameter_vector(model), present)
    twin = deep_network()
    undisturbed = built(kind, twin)
    for x, y in batches(5, dtype=torch.float32):
        undisturbed.step(x, y)
    x, y = batches(6, dtype=torch.float32)[5]
    optimizer.step(x, y)
    undisturbed.step(x, y)
    assert torch.equal(parameter_vector(model), parameter_vector(twin))


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model, plain = deep_network(), deep_network()
    optimizer = built("muon", model)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    x, y = batches(1, dtype=torch.float32)[0]
    optimizer.step(x, y)
    nn.functional.cross_entropy(plain(x), y).backward()
    reference.step()
    for name, p in model.named_parameters():
        same = torch.allclose(p, plain.get_parameter(name), atol=1e-6)
        assert same == (name != "2.weight"), name
    start = deep_network().get_parameter("2.weight")
    step = (start * (1 - 0.01 * 0.1) - model.get_parameter("2.weight")).detach() / 0.01
    assert torch.linalg.svdvals(step)[:6].min() > 0.3  # orthogonal, up to the error of five iterations


def test_wrong_kinds_and_options_are_named() -> None:
    pytest.importorskip("pytorch_optimizer")
    model = deep_network()
    with pytest.raises(ValueError, match="SOAP has no option 'precondition_every'; it has lr, betas"):
        build("pytorch_optimizer:SOAP", {"precondition_every": 2}, model, C, lr=0.1)
    with pytest.raises(ValueError, match="has no 'AdamWX'"):
        build("torch.optim:AdamWX", {}, model, C, lr=0.1)
    with pytest.raises(ValueError, match="no_such_package"):
        build("no_such_package:AdamW", {}, model, C, lr=0.1)
    with pytest.raises(ValueError, match="2D"):
        build("torch.optim:Muon", {}, model, C, lr=0.1)
    with pytest.raises(ValueError, match="no hidden weight matrix"):
        build("muon", {}, nn.Linear(5, C), C, lr=0.1)


def test_the_first_and_last_matrix_of_muon_are_the_models_also_where_they_are_frozen() -> None:
    pytest.importorskip("pytorch_optimizer")
    model = deep_network()
    model[0].requires_grad_(False)
    optimizer = build("muon", {}, model, C, lr=0.01)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model[2].weight)]
