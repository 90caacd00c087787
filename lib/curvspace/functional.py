r"""A model as a function of one flat parameter vector.

With the trainable parameters of a module written as one vector :math:`\theta \in \mathbb{R}^P`, in
``named_parameters()`` order (parameters with ``requires_grad=False`` are constants, tied ones count once),

.. math:: z = \phi(\theta, x).

Everything in the library that moves in parameter space goes through these few functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.inputs import Inputs, call
from curvspace.module_state import substituted
from curvspace.threads import one_at_a_time


@one_at_a_time
def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, in ``named_parameters()`` order.

    Raises
    ------
    ValueError
        If there are none, or one is complex.
    """
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad=True; nothing to differentiate: "
            "for a frozen copy (an average of weights) call its requires_grad_()"
        )
    for name, p in found.items():
        if p.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex; keep its real and imaginary parts in a real one (torch.view_as_real)"
            )
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers: the same parameters, same order."""
    while True:
        if type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Call the model with the named parameters and buffers replaced by ``tensors``."""
    with substituted(model, tensors):
        return call(model, inputs)
