"""Networks: sizes, shapes, options, and that every derivative the library takes exists and is right."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.functional import adaptive_avg_pool2d, conv2d, cross_entropy, max_pool2d

from curvspace.models import KINDS, build, module_of

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "input_shape", "num_classes", "parameters"),
    [
        ("resnet9", {}, CIFAR, 10, 6_573_130),
        ("resnet18", {}, CIFAR, 10, 11_173_962),
        ("cnn-60k", {}, CIFAR, 10, 62_006),
        ("cnn-400", {}, MNIST, 10, 358),
        ("cnn-222", {}, MNIST, 10, 222),
        ("resnet9", {"logit_scale": 1 / 16, "head_bias": False}, CIFAR, 10, 6_573_120),
        ("fc", {}, MNIST, 10, 89_610),
        ("fc", {"widths": [32, 32]}, MNIST, 10, 26_506),
        ("fc", {"widths": [256, 256]}, CIFAR, 100, 878_180),
        ("softmax", {}, MNIST, 10, 7_850),
        ("softmax", {"bias": False}, (1000,), 2, 2_000),
        ("mlp-tanh", {}, MNIST, 10, 111_146),
        ("convnet", {}, CIFAR, 10, 1_250_858),
        ("lenet", {}, MNIST, 10, 3_274_634),
        ("cifar-basic", {}, CIFAR, 10, 145_578),
        ("cifar-basic", {"batch_norm": True}, CIFAR, 10, 145_962),
        ("cifar-basic", {"poolings": ["max", "average", "average"], "initialisation": "normal"}, CIFAR, 10, 145_578),
        ("vgg-f", {}, (3, 224, 224), 100, 57_147_236),  # 0.2 GB and over a second: the only one of its size here
    ],
)
def test_number_of_parameters(
    kind: str, options: dict[str, Any], input_shape: tuple[int, ...], num_classes: int, parameters: int
):
    assert count(build(kind, options, input_shape, num_classes)) == parameters


SMALL: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("resnet9", {"width": 2}, (1, 8, 8)),
    ("resnet9", {"width": 2, "batch_norm": False, "logit_scale": 0.125}, (3, 12, 12)),
    ("resnet18", {"width": 2}, (3, 8, 8)),
    ("cnn-60k", {}, (1, 16, 16)),
    ("cnn-400", {}, (1, 8, 8)),
    ("cnn-222", {}, (1, 16, 16)),
    ("fc", {"widths": [5, 4], "activation": "softplus"}, (1, 4, 4)),
    ("softmax", {}, (6,)),
    ("mlp-tanh", {"widths": [5, 4, 3]}, (1, 4, 4)),
    ("convnet", {"batch_norm": True, "extra_dense": 4, "dense": 6}, (1, 16, 16)),
    ("lenet", {"channels": (2, 3), "dense": 5}, (1, 8, 8)),
    ("cifar-basic", {"batch_norm": True, "channels": (2, 2, 3, 4)}, (3, 8, 8)),
    ("cifar-basic", {"channels": (2, 2, 3, 4), "poolings": ("max", "average", "average")}, (3, 8, 8)),
    ("vgg-f", {"channels": (3, 4), "dense": 6, "dropout": 0.0}, (3, 63, 63)),
]


def test_every_kind_is_among_the_small_ones():
    assert {kind for kind, _, _ in SMALL} == set(KINDS)


@pytest.mark.parametrize(("kind", "options", "input_shape"), SMALL)
def test_curvature_products_exist_and_agree(kind: str, options: dict[str, Any], input_shape: tuple[int, ...]):
    """Forward over reverse mode against two backward passes, in float64, with BatchNorm in train mode."""
    torch.manual_seed(0)
    model = build(kind, options, input_shape, 3).double()
    x, y = torch.randn(4, *input_shape, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    vector = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        state = {name: b.clone() for name, b in buffers.items()}
        return cross_entropy(functional_call(model, {**values, **state}, (x,)), y)

    _, forward_over_reverse = jvp(grad(loss), (parameters,), (vector,))
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(first, vector.values(), strict=True))
    second = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
    for product, expected in zip(forward_over_reverse.values(), second, strict=True):
        torch.testing.assert_close(product, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "options", "input_shape"), SMALL)
def test_the_seed_fixes_the_weights(kind: str, options: dict[str, Any], input_shape: tuple[int, ...]):
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.reshape(-1) for p in build(kind, options, input_shape, 3).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_cifar_basic_pools_and_starts_as_in_the_authors_program():
    torch.manual_seed(0)
    options = {"poolings": ("max", "average", "average"), "initialisation": "normal"}
    model = build("cifar-basic", options, CIFAR, 10)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, deviation in zip(layers, (0.01, 0.05, 0.05, 0.05, 0.05), strict=True):
        n = layer.weight.numel()
        assert layer.weight.std().item() == pytest.approx(deviation, rel=4 / (2 * n) ** 0.5)  # four s.d. of an s.d.
        assert not layer.bias.any()
    c1, c2, c3, dense, last = layers
    x = torch.randn(2, *CIFAR)
    h = max_pool2d(c1(x).relu(), 3, 2, 1)
    for conv in (c2, c3):  # the mean of nine, zeros beyond the edge among them
        h = conv2d(conv(h).relu(), torch.full((conv.out_channels, 1, 3, 3), 1 / 9), None, 2, 1, 1, conv.out_channels)
    torch.testing.assert_close(model(x), last(dense(h.flatten(1)).relu()))


@pytest.mark.parametrize(
    "wrong", [{"poolings": ["max", "max"]}, {"poolings": ["max", "max", "median"]}, {"initialisation": "glorot"}]
)
def test_cifar_basic_refuses_what_it_does_not_know(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"cifar-basic: (poolings|initialisation) must be"):
        build("cifar-basic", wrong, CIFAR, 10)


def test_resnet18_computes_what_torchvisions_does_without_its_stem():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs, ours = resnet18(num_classes=10), build("resnet18", {}, CIFAR, 10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    pairs = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(source)
        x = torch.randn(2, *CIFAR)
        torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [8, 9, 16, 27, 28, 32])
def test_cnn_400_averages_as_adaptive_pooling_does(size: int):
    *before, pool, _, _ = build("cnn-400", {}, (1, size, size), 10)
    maps = nn.Sequential(*before)(torch.randn(2, 1, size, size))
    torch.testing.assert_close(pool(maps), adaptive_avg_pool2d(maps, 2))


def test_convnet_options_stand_where_they_are_said_to():
    plain = [type(layer) for layer in build("convnet", {}, CIFAR, 10)]
    assert nn.Dropout not in plain
    assert nn.BatchNorm2d not in plain
    full = list(build("convnet", {"dropout": True, "batch_norm": True, "extra_dense": 128}, CIFAR, 10))
    assert [layer.p for layer in full if isinstance(layer, nn.Dropout)] == [0.25, 0.25, 0.5, 0.5]
    assert sum(isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) for layer in full) == 6
    assert [layer.out_features for layer in full if isinstance(layer, nn.Linear)] == [512, 128, 10]
    for before, after in pairwise(full):  # normalised before the activation, never after it
        if isinstance(after, nn.BatchNorm2d | nn.BatchNorm1d):
            assert isinstance(before, nn.Conv2d | nn.Linear)
        if isinstance(before, nn.BatchNorm2d | nn.BatchNorm1d):
            assert isinstance(after, nn.ReLU)


def test_initialisations_on_request():
    torch.manual_seed(0)
    weights = build("mlp-tanh", {}, MNIST, 10)[1].weight
    assert weights.std().item() == pytest.approx(1.0, abs=0.01)
    assert all(not p.any() for p in build("softmax", {"initialisation": "zero"}, MNIST, 10).parameters())


@pytest.mark.parametrize(
    ("kind", "options", "input_shape"),
    [
        ("fc", {}, MNIST),
        ("softmax", {}, MNIST),
        ("convnet", {"batch_norm": True, "dense": 256, "extra_dense": 64}, CIFAR),
    ],
)
def test_glorot_is_keras_default(kind: str, options: dict[str, Any], input_shape: tuple[int, ...]):
    """Uniform within ±sqrt(6/(fan_in + fan_out)), fans as Keras counts them; biases 0; batch normalisation 1 and 0."""
    torch.manual_seed(0)
    kernels = 0
    for layer in build(kind, {**options, "initialisation": "glorot"}, input_shape, 10).modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            kernels += 1
            if isinstance(layer, nn.Conv2d):
                area = layer.kernel_size[0] * layer.kernel_size[1]
                fans = area * layer.in_channels + area * layer.out_channels
            else:
                fans = layer.in_features + layer.out_features
            bound, w = (6 / fans) ** 0.5, layer.weight.detach()
            assert w.abs().max() <= bound
            assert w.abs().max() > 0.99 * bound
            spread = bound / 3**0.5  # s.d. of the uniform distribution; that of its estimate is 0.45/sqrt(n) of it
            assert w.std().item() == pytest.approx(spread, rel=5 * 0.45 / w.numel() ** 0.5)
            assert abs(w.mean().item()) < 5 * spread / w.numel() ** 0.5
            assert layer.bias is not None
            assert not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (layer.weight == 1).all()
    assert kernels == {"fc": 3, "softmax": 1, "convnet": 7}[kind]


@pytest.mark.parametrize(
    ("kind", "options", "input_shape", "words"),
    [
        ("resnet", {}, CIFAR, ["'resnet'", "resnet9", "module:function"]),
        ("fc", {"width": 3}, MNIST, ["'fc'", "width"]),
        ("fc", {"activation": "swish"}, MNIST, ["'swish'", "relu"]),
        ("fc", {"widths": [0]}, MNIST, ["[0]"]),
        ("mlp-tanh", {"init_std": 0.0}, MNIST, ["init_std", "0.0"]),
        ("fc", {"initialisation": "he"}, MNIST, ["torch, glorot", "'he'"]),
        ("convnet", {"initialisation": "zero"}, CIFAR, ["torch, glorot", "'zero'"]),
        ("convnet", {"dropout": 0.3}, CIFAR, ["dropout", "0.3", "True or False"]),
        ("convnet", {"extra_dense": -3}, CIFAR, ["'convnet'", "extra_dense = -3"]),
        ("fc", {"widths": [2.5]}, MNIST, ["'fc'", "[2.5]"]),
        ("lenet", {"channels": [4]}, MNIST, ["'lenet'", "channels = [4]"]),
        ("resnet9", {"width": 0}, CIFAR, ["width = 0", "no entries"]),
        ("resnet9", {"logit_scale": float("nan")}, CIFAR, ["logit_scale", "not finite"]),
        ("cnn-60k", {}, (1, 8, 8), ["16×16", "8×8", "resize"]),
        ("lenet", {}, (1000,), ["(1000,)"]),
        ("no_such_module:net", {}, MNIST, ["no_such_module"]),
        ("math:net", {}, MNIST, ["math", "net"]),
    ],
)
def test_wrong_requests_are_named(kind: str, options: dict[str, Any], input_shape: tuple[int, ...], words: list[str]):
    with pytest.raises(ValueError) as error:
        build(kind, options, input_shape, 10)
    assert all(word in str(error.value) for word in words)


def test_a_users_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_net.py").write_text(
        "import torch\ndef line(input_shape, num_classes, bias=True):\n"
        "    return torch.nn.Linear(input_shape[0], num_classes, bias=bias)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert count(build("own_net:line", {"bias": False}, (7,), 3)) == 21
    assert module_of("own_net:line") == "own_net"
    for text in ("false", "True", "None", "off", "0"):
        with pytest.raises(ValueError, match=f"'own_net:line': bias must be True or False, got '{text}'"):
            build("own_net:line", {"bias": text}, (7,), 3)
    sys.modules.pop("own_net")


def test_each_kind_has_one_module():
    assert module_of("fc") == module_of("softmax") == "curvspace.models.fully_connected"
    assert module_of("resnet9") != module_of("resnet18")
