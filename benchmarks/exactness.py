"""How far each library's Hessian product is from central differences of the gradient, in float64, layer by layer."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor], Tensor]

IMAGES, SEQUENCES, TOKENS = (16, 2, 6, 6), (16, 5, 6), (16, 5)


class Attention(nn.Module):
    """Self-attention over a sequence (N, 5, 6), its mean read out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """An LSTM over a sequence (N, 5, 6), its last output read out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """An embedding whose matrix is also that of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 6)
        self.inner = nn.Linear(6, 6)
        self.output = nn.Linear(6, 3)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.inner(self.embedding(tokens).mean(1))))


def _image_network(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


def _situations() -> dict[str, tuple[nn.Module, tuple[int, ...], Loss]]:
    """A network, the shape of its inputs and the loss, by what is special about it."""
    mean = F.cross_entropy
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    stored = nn.BatchNorm2d(4)
    stored.load_state_dict({**stored.state_dict(), "running_mean": torch.full((4,), 0.1)})
    embedding = nn.Sequential(nn.Embedding(3, 6), nn.Flatten(), nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), nn.Tanh(), nn.Flatten())
    return {
        "plain": (_image_network(), IMAGES, mean),
        "BatchNorm, batch": (_image_network(nn.BatchNorm2d(4)), IMAGES, mean),
        "BatchNorm, running": (_image_network(stored).eval(), IMAGES, mean),
        "LayerNorm": (_image_network(nn.LayerNorm((4, 4, 4))), IMAGES, mean),
        "GroupNorm": (_image_network(nn.GroupNorm(2, 4)), IMAGES, mean),
        "attention": (Attention(), SEQUENCES, mean),
        "LSTM": (Recurrent(), SEQUENCES, mean),
        "weight_norm": (nn.Sequential(*normed, nn.Linear(64, 3)), IMAGES, mean),
        "embedding": (embedding, TOKENS, mean),
        "tied weights": (Tied(), TOKENS, mean),
        "class weights": (_image_network(), IMAGES, nn.CrossEntropyLoss(weight=weights)),
        "soft labels": (_image_network(), IMAGES, mean),
    }


def _ours(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, v: Tensor) -> Tensor:
    return Objective(model, [(x, y)], loss).hessian() @ v


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, v: Tensor) -> Tensor:
    from curvlinops import HessianLinearOperator

    criterion = loss if isinstance(loss, nn.Module) else nn.CrossEntropyLoss()
    operator = HessianLinearOperator(model, criterion, list(model.parameters()), [(x, y)], check_deterministic=False)
    return operator @ v


def _hessian_eigenthings(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, v: Tensor) -> Tensor:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(model, [(x, y)], supervised_loss(loss)).matvec(v)


def _pyhessian(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, v: Tensor) -> Tensor:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    computed = hessian(model, loss, data=(x, y), cuda=False)
    sizes = [p.numel() for p in computed.params]
    parts = [part.view_as(p) for part, p in zip(v.split(sizes), computed.params, strict=True)]
    return torch.cat([h.reshape(-1) for h in hessian_vector_product(computed.gradsH, computed.params, parts)])


Product = Callable[[nn.Module, Tensor, Tensor, Loss, Tensor], Tensor]
TOOLS: dict[str, Product] = {
    "curvspace": _ours,
    "curvlinops": _curvlinops,
    "hessian_eigenthings": _hessian_eigenthings,
    "pyhessian": _pyhessian,
}


def central_difference(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, v: Tensor, step: float = 1e-5) -> Tensor:
    """(g(theta + step v) - g(theta - step v)) / (2 step) with the user's own backward pass."""
    parameters = list(model.parameters())
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    gradients = []
    for sign in (1, -2, 1):  # there, to the other side, and back
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.add_(part, alpha=sign * step)
        gradients.append(torch.autograd.grad(loss(model(x), y), parameters))
    pairs = zip(gradients[0], gradients[1], strict=True)
    return torch.cat([(a - b).reshape(-1) / (2 * step) for a, b in pairs])


def errors() -> Iterator[Row]:
    """|Hv - reference| / |reference| of each library in each situation; what it raises where it raises."""
    torch.manual_seed(0)
    for situation, (model, shape, loss) in _situations().items():
        model.double()
        tokens = shape is TOKENS
        x = torch.randint(3, shape) if tokens else torch.randn(shape, dtype=torch.float64)
        y = torch.randint(3, (16,))
        if situation == "soft labels":
            y = torch.softmax(torch.randn(16, 3, dtype=torch.float64), 1)
        v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        reference = central_difference(model, x, y, loss, v)
        for name, product in TOOLS.items():
            if name != "curvspace" and not importlib.util.find_spec(name):
                continue
            training = model.training
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = product(model, x, y, loss, v)
                error, note = float((found - reference).norm() / reference.norm()), ""
            except Exception as failure:  # whatever another library raises is the result
                error, note = float("nan"), f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
            model.train(training)
            model.zero_grad(set_to_none=True)
            yield {"situation": situation, "tool": name, "relative_error": error, "note": note}
