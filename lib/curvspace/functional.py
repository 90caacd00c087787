r"""A model as a function of one flat parameter vector.

With the trainable parameters of a module written as one vector :math:`\theta \in \mathbb{R}^P`, in
``named_parameters()`` order (parameters with ``requires_grad=False`` are constants, tied ones count once),

.. math:: z = \phi(\theta, x).

Everything in the library that moves in parameter space goes through these few functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor (``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``)."""


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, in ``named_parameters()`` order.

    Raises
    ------
    ValueError
        If there are none.
    """
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True; nothing to differentiate")
    return found


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors, one after the other, as one vector (P,)."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Views of a vector (P,) in the shapes of ``like``: the inverse of :func:`flatten`.

    Raises
    ------
    ValueError
        If the vector's length is not the number of entries of ``like``.
    """
    shapes = [t.shape for t in like]
    sizes = [s.numel() for s in shapes]
    if vector.ndim != 1 or vector.shape[0] != sum(sizes):
        raise ValueError(f"expected a vector of {sum(sizes)} entries, got shape {tuple(vector.shape)}")
    return tuple(part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True))


def parameter_vector(model: nn.Module) -> Tensor:
    """A detached copy of the trainable parameters as one vector (P,)."""
    return flatten(p.detach() for p in trainable_parameters(model).values())


@torch.no_grad()
def add_to_parameters(model: nn.Module, vector: Tensor, alpha: float = 1.0) -> None:
    r"""In place, :math:`\theta \leftarrow \theta + \alpha v` for a flat vector v (P,)."""
    parameters = list(trainable_parameters(model).values())
    torch._foreach_add_(parameters, list(unflatten(vector, parameters)), alpha=alpha)


@torch.no_grad()
def assign_parameters(model: nn.Module, vector: Tensor) -> None:
    r"""In place, :math:`\theta \leftarrow v` for a flat vector v (P,)."""
    parameters = list(trainable_parameters(model).values())
    for p, value in zip(parameters, unflatten(vector, parameters), strict=True):
        p.copy_(value)


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """``model(x)``, ``model(*x)`` or ``model(**x)`` for a tensor, a sequence or a mapping."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """Call the model with the named parameters and buffers replaced by ``tensors``."""
    if isinstance(inputs, Tensor):
        return functional_call(model, dict(tensors), (inputs,))
    if isinstance(inputs, Mapping):
        return functional_call(model, dict(tensors), (), dict(inputs))
    return functional_call(model, dict(tensors), tuple(inputs))


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    r""":math:`J^\top u = \nabla_x \sum_i \langle y_i(x), u_i \rangle` for outputs y that have a graph to the inputs x.

    ``batched``: m cotangents at once, stacked in front of each u. The options are those of ``torch.autograd.grad``.
    That takes cotangents as ``grad_outputs`` too, but imports sympy to compare shapes at its first use: half a second
    of every process that multiplies with a Hessian. The result is the same, bit for bit.
    """
    if batched:
        return torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, **options)
    with torch.enable_grad():
        inner = flatten(outputs) @ flatten(cotangents)
    return torch.autograd.grad(inner, inputs, **options)


def batch_size(inputs: Inputs) -> int:
    """Number of examples: the first dimension of the first tensor among the inputs."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
    raise ValueError("a batch's inputs hold no tensor, so its number of examples is unknown")


def select(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """The examples ``index`` of a batch's inputs, whatever their form."""
    if isinstance(inputs, Tensor):
        return inputs[index]
    if isinstance(inputs, Mapping):
        return {k: v[index] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return tuple(v[index] if isinstance(v, Tensor) else v for v in inputs)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever forward passes inside do to the buffers (running statistics), they leave as they were."""
    saved = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def replayed_randomness(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Draws inside (dropout) come from ``seed``, or from the present state, and leave the generators as they were.

    Two passes, each inside its own such block entered at the same state, see the same dropout masks.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
