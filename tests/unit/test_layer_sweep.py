"""Layer by layer: Hessian and Gauss-Newton products against central differences of gradients and outputs, in float64.

Differences, not double backward: torch's own second derivative is wrong for some layers (weight normalisation).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from curvspace import Objective
from curvspace.curvature import dense_matrix
from tests.unit.oracles import central_difference, dense_gauss_newton, trainable
from tests.unit.small_networks import Fn


def _vector(layer: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(6), nn.Flatten(), nn.LazyLinear(3))


def _image(layer: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), layer(4), nn.Flatten(), nn.LazyLinear(3))


def _sequence(layer: Callable[[int], nn.Module]) -> nn.Module:
    first = Fn(lambda s, x: (x[0] if isinstance(x, tuple) else x).mean(1))
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(6), first, nn.LazyLinear(3))


def _f(f: Callable[[Tensor], Tensor]) -> Callable[[int], nn.Module]:
    return lambda _: Fn(lambda s, x: f(x))


ACTIVATIONS = [
    "ReLU",
    "ReLU6",
    "ELU",
    "SELU",
    "CELU",
    "GELU",
    "SiLU",
    "Mish",
    "Softplus",
    "Softsign",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Sigmoid",
    "Tanhshrink",
    "Softshrink",
    "Hardshrink",
    "PReLU",
    "GLU",
    "RReLU",
]
VECTOR: dict[str, Callable[[int], nn.Module]] = {
    **{name: (lambda h, name=name: getattr(nn, name)()) for name in ACTIVATIONS},
    "softmax": lambda h: nn.Softmax(1),
    "log-softmax": lambda h: nn.LogSoftmax(1),
    "layer norm": nn.LayerNorm,
    "RMS norm": nn.RMSNorm,
    "batch norm": nn.BatchNorm1d,
    "weight norm": lambda h: parametrizations.weight_norm(nn.Linear(h, h)),
    "weight norm, dim 1": lambda h: parametrizations.weight_norm(nn.Linear(h, h), dim=1),
    "weight norm, dim None": lambda h: parametrizations.weight_norm(nn.Linear(h, h), dim=None),
    "older weight norm": lambda h: weight_norm(nn.Linear(h, h)),
    "older weight norm, dim 1": lambda h: weight_norm(nn.Linear(h, h), dim=1),
    "older weight norm, dim None": lambda h: weight_norm(nn.Linear(h, h), dim=None),
    "spectral norm": lambda h: parametrizations.spectral_norm(nn.Linear(h, h)),
    "orthogonal": lambda h: parametrizations.orthogonal(nn.Linear(h, h)),
    "normalize": _f(lambda x: F.normalize(x, dim=1)),
    "products": _f(lambda x: x.cumprod(1)),
    "sort and top": _f(lambda x: torch.cat([x.logsumexp(1, True), x.sort(1)[0], x.topk(2)[0]], 1)),
    "moments and norms": _f(lambda x: torch.stack([x.var(1), x.std(1), x.norm(dim=1), x.norm(p=3, dim=1)], 1)),
    "singular values": _f(lambda x: torch.linalg.svdvals(x.view(-1, 2, 3))),
    "inverse": _f(lambda x: torch.linalg.inv(2 * torch.eye(2).double() + x[:, :4].view(-1, 2, 2)).flatten(1)),
    "matrix exponential": _f(lambda x: torch.matrix_exp(x[:, :4].view(-1, 2, 2)).flatten(1)),
    "Fourier": _f(lambda x: torch.fft.rfft(x).abs()),
    "powers": _f(lambda x: torch.atan2(x, 1 + x.exp()) + (1 + x.square()).pow(x)),
}
IMAGE: dict[str, Callable[[int], nn.Module]] = {
    "group norm": lambda c: nn.GroupNorm(2, c),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "local response norm": lambda c: nn.LocalResponseNorm(2),
    "batch norm 2d": nn.BatchNorm2d,
    "max pooling": lambda c: nn.MaxPool2d(2),
    "average pooling": lambda c: nn.AvgPool2d(2),
    "adaptive pooling": lambda c: nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.AdaptiveAvgPool2d(2)),
    "power pooling": lambda c: nn.LPPool2d(2, 2),
    "bilinear": lambda c: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": lambda c: nn.Upsample(scale_factor=2, mode="bicubic"),
    "pixel shuffle": lambda c: nn.PixelShuffle(2),
    "unfold": lambda c: nn.Unfold(3),
    "reflection": lambda c: nn.ReflectionPad2d(1),
    "circular convolution": lambda c: nn.Conv2d(c, 3, 3, padding=1, padding_mode="circular"),
    "transposed convolution": lambda c: nn.ConvTranspose2d(c, 4, 3, stride=2, groups=2, dilation=2),
    "depthwise convolution": lambda c: nn.Conv2d(c, c, 3, groups=c),
    "convolution, same": lambda c: nn.Conv2d(c, c, 3, padding="same"),
    "weight-normed convolution": lambda c: parametrizations.weight_norm(nn.Conv2d(c, c, 3)),
    "weight-normed convolution, dim 1": lambda c: parametrizations.weight_norm(nn.Conv2d(c, c, 3), dim=1),
    "weight-normed transposed": lambda c: parametrizations.weight_norm(nn.ConvTranspose2d(c, c, 3), dim=1),
    "einsum": _f(lambda x: torch.einsum("nchw,ndhw->ncd", x, x)),
}
SEQUENCE: dict[str, Callable[[int], nn.Module]] = {
    "LSTM": lambda h: nn.LSTM(h, 4, batch_first=True),
    "two-way LSTM": lambda h: nn.LSTM(h, 3, 2, bidirectional=True, batch_first=True),
    "GRU": lambda h: nn.GRU(h, 4, batch_first=True),
    "RNN": lambda h: nn.RNN(h, 4, nonlinearity="relu", batch_first=True),
    "attention": lambda h: Fn(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(h, 2, batch_first=True)),
    "transformer layer": lambda h: nn.TransformerEncoderLayer(h, 2, 8, batch_first=True, dropout=0.0),
    "convolution 1d": lambda h: Fn(lambda s, x: s.c(x.mT).mT, c=nn.Conv1d(h, 4, 2)),
}


def _reals(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(7, *shape, dtype=torch.float64)


def _ids() -> Tensor:
    return torch.randint(7, (7, 5))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{name: (lambda layer=layer: _vector(layer), _reals(4)) for name, layer in VECTOR.items()},
    **{name: (lambda layer=layer: _image(layer), _reals(2, 6, 6)) for name, layer in IMAGE.items()},
    **{name: (lambda layer=layer: _sequence(layer), _reals(5, 4)) for name, layer in SEQUENCE.items()},
    "in place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.SiLU(inplace=True), nn.Linear(6, 3)), _reals(4)),
    "bilinear form": (
        lambda: Fn(lambda s, x: s.b(torch.tanh(s.a(x)), x), a=nn.Linear(4, 5), b=nn.Bilinear(5, 4, 3)),
        _reals(4),
    ),
    "distances": (
        lambda: Fn(lambda s, x: -torch.cdist(s.a(x), s.w), a=nn.Linear(4, 5), w=nn.Parameter(torch.randn(3, 5))),
        _reals(4),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), _ids),
}
WITHOUT_SECOND_DERIVATIVE = {
    "Hardsigmoid": (lambda: _vector(lambda h: nn.Hardsigmoid()), _reals(4)),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3)), _ids),
}


def _problem(make: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = make().double(), inputs()
    model(x)  # lazy layers take their size
    return model.eval(), x, torch.randint(3, (7,))


@torch.no_grad()
def _along(model: nn.Module, x: Tensor, v: Tensor, h: float = 1e-5) -> Tensor:
    """J v by central differences of the outputs."""
    parameters = trainable(model)
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    outputs = []
    for t in (h, -h):
        torch._foreach_add_(parameters, parts, alpha=t)
        outputs.append(model(x))
        torch._foreach_sub_(parameters, parts, alpha=t)
    return (outputs[0] - outputs[1]) / (2 * h)


@pytest.mark.parametrize(("make", "inputs"), LAYERS.values(), ids=LAYERS.keys())
def test_products(make, inputs):
    model, x, y = _problem(make, inputs)
    for m in model.modules():
        m.train(isinstance(m, nn.modules.batchnorm._BatchNorm))
    objective = Objective(model, (x, y))
    H, G = objective.hessian(), objective.gauss_newton()
    torch.manual_seed(0)
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    V /= V.norm(dim=0)
    products = H @ V
    expected = central_difference(model, [(x, y)], "cross_entropy", V[:, 0])
    assert (products[:, 0] - expected).norm() < 1e-6 * expected.norm() + 1e-9
    assert abs(V[:, 1] @ products[:, 0] - V[:, 0] @ products[:, 1]) < 1e-12
    H.vectors_at_once = 2
    torch.testing.assert_close(H @ V, products, rtol=0, atol=1e-12)
    jv, p = _along(model, x, V[:, 0]), model(x).detach().softmax(1)
    curvature = (jv * (p * jv - p * (p * jv).sum(1, keepdim=True))).sum() / len(x)
    assert abs(V[:, 0] @ (G @ V[:, 0]) - curvature) < 1e-6 * curvature


@pytest.mark.parametrize(("make", "inputs"), WITHOUT_SECOND_DERIVATIVE.values(), ids=WITHOUT_SECOND_DERIVATIVE.keys())
def test_layers_without_second_derivative_are_errors_and_differences_serve(make, inputs):
    model, x, y = _problem(make, inputs)
    objective = Objective(model, (x, y))
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    v /= v.norm()
    with pytest.raises(RuntimeError, match="not implemented"):
        objective.hessian() @ v
    expected = central_difference(model, [(x, y)], "cross_entropy", v)
    torch.testing.assert_close(objective.hessian_by_differences() @ v, expected, rtol=1e-6, atol=1e-9)


class Slope(nn.Module):
    """A network's derivative in its inputs."""

    def __init__(self, layer: nn.Module, way: str):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), layer, nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "grad":
            return torch.func.grad(lambda x: self.net(x).sum())(x)
        if self.way == "vmap of grad":
            return torch.func.vmap(torch.func.grad(lambda x: self.net(x[None]).sum()))(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def _convolutions() -> nn.Module:
    layers = nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.ConvTranspose1d(2, 1, 3, padding=1)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), *layers)


SLOPES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "convolutions": _convolutions,
    "stored statistics": lambda: nn.BatchNorm1d(4).eval(),
    "batch statistics": lambda: nn.BatchNorm1d(4),
    "batch statistics, no weights": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "layer norm": lambda: nn.LayerNorm(4),
    "layer norm, no bias": lambda: nn.LayerNorm(4, bias=False),
    "layer norm, no weights": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("way", ["autograd", "grad", "vmap of grad"])
@pytest.mark.parametrize("name", SLOPES)
def test_layers_that_the_model_differentiates(name, way):
    if name == "batch statistics" and way != "autograd":
        pytest.skip("torch.func refuses to write running statistics")
    if name.startswith("batch statistics") and way == "vmap of grad":
        pytest.skip("one example has no statistics")
    torch.manual_seed(0)
    model, x, y = Slope(SLOPES[name](), way).double(), torch.randn(7, 6).double(), torch.randn(7, 6).double()
    objective = Objective(model, (x, y), "mse")
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    expected = central_difference(model, [(x, y)], "mse", v)
    assert (objective.hessian() @ v - expected).norm() < 1e-6 * expected.norm()
    jv = _along(model, x, v)
    assert float(v @ (objective.gauss_newton() @ v)) == pytest.approx(float((jv * jv).sum() / 7), rel=1e-6)


class Cumulative(nn.Module):
    """Ends in a function whose backward pass takes logarithms of the cotangent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).logcumsumexp(1)


def test_a_backward_pass_with_another_derivative_at_zero():
    torch.manual_seed(0)
    model, x, y = Cumulative().double(), torch.randn(9, 4).double(), torch.randint(6, (9,))
    G = Objective(model, (x, y)).gauss_newton()
    v = torch.randn(30).double()
    jv, p = _along(model, x, v), model(x).detach().softmax(1)
    assert float(v @ (G @ v)) == pytest.approx(
        float((jv * (p * jv - p * (p * jv).sum(1, keepdim=True))).sum() / 9), rel=1e-6
    )
    torch.testing.assert_close(dense_matrix(G), dense_gauss_newton(model, [(x, y)], "cross_entropy"))


class Hooked(nn.Module):
    def __init__(self, hook: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.hook = nn.Linear(4, 5), nn.Linear(5, 3), hook

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(self.hook)
        return self.b(torch.tanh(h))


@pytest.mark.parametrize("hook", [lambda g: g / g.norm(), lambda g: g.clamp(-0.1, 0.1), lambda g: 2 * g.abs().sqrt()])
@pytest.mark.parametrize("together", [1, 3])
def test_a_backward_pass_that_is_not_linear(hook, together):
    torch.manual_seed(0)
    batch = torch.randn(9, 4).double(), torch.randint(3, (9,))
    for given, refused in ((lambda g: g, False), (hook, True)):
        objective = Objective(Hooked(given).double(), batch)
        V = torch.randn(objective.num_parameters, 3).double()

        def product(objective: Objective = objective, V: Tensor = V) -> Tensor:
            G = objective.gauss_newton()
            G.vectors_at_once = together
            return G @ V

        if not refused:
            assert (V * product()).sum() > 0
            continue
        with pytest.raises(RuntimeError, match="the backward pass of Hooked is not linear"):
            product()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jacobian_that_is_nothing_but_rounding(dtype):
    """Batch statistics take the bias before them away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    G = Objective(model, (torch.randn(9, 4), torch.randint(3, (9,))), parameters="0.bias", dtype=dtype).gauss_newton()
    assert (G @ torch.ones(5)).norm() < 1e-10
