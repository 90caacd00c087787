"""Losses by their names, and torch's own ones, as functions or modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvspace.loss_state import is_bound
from curvspace.losses.base import KnownLoss, Loss, TorchLoss
from curvspace.losses.closed_forms import (
    KNOWN,
    BinaryCrossEntropy,
    CrossEntropy,
    MeanSquaredError,
    NegativeLogLikelihood,
)


def options_of(loss: str | Loss | Callable[[Any, Any], Tensor]) -> list[Any]:
    """What :func:`get_loss` and a loss's weights read of it, and may be replaced or overwritten later."""
    if isinstance(loss, nn.Module):
        return [getattr(loss, name, None) for name in ("weight", "pos_weight", *_PLAIN_OPTIONS)]
    if isinstance(loss, functools.partial):
        return list(loss.keywords.values())
    return list(vars(getattr(loss, "_labels", loss)).values()) if isinstance(loss, Loss) else []


def plain_variables(loss: Any) -> list[Any]:
    """The numbers and words that a callable's own code may read: global variables, those around it, attributes."""
    functions = [loss, *(getattr(type(loss), name, None) for name in ("forward", "__call__"))]
    found: list[Any] = [] if isinstance(loss, FunctionType) else list(getattr(loss, "__dict__", {}).values())
    for f in (f for f in functions if isinstance(f, FunctionType)):
        found += (f.__globals__.get(name) for name in f.__code__.co_names)
        found += (cell.cell_contents for cell in f.__closure__ or () if is_bound(cell))
    return [value for value in found if issubclass(type(value), bool | int | float | str)]


def get_loss(loss: str | Loss | Callable[[Any, Any], Tensor]) -> Loss:
    """A loss by name (the keys of ``KNOWN``), a :class:`Loss`, or any callable(outputs, targets) -> mean loss.

    torch's own losses are recognised, as functions, modules or ``functools.partial`` of the functions: they get their
    closed forms and are put together by their own weights.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in KNOWN:
            raise ValueError(f"unknown loss {loss!r}; use one of {sorted(KNOWN)} or a callable(outputs, targets)")
        return KNOWN[loss]()
    if not callable(loss):
        raise ValueError(f"a loss is a name or a callable(outputs, targets), got {loss!r}")
    return _recognised(loss) or _of_torch(loss) or Loss(loss)


def _recognised(loss: Callable[[Any, Any], Tensor]) -> Loss | None:
    if isinstance(loss, nn.Module):
        options = _MODULES.get(type(loss))
        if options is None or loss._forward_hooks or loss._forward_pre_hooks:
            return None
        kind, names = options
        return kind(**{name: getattr(loss, name) for name in (*names, "reduction")})
    given: Any = loss
    keywords: Mapping[str, Any] = {}
    if isinstance(given, functools.partial) and not given.args:
        given, keywords = given.func, given.keywords
    for function, (kind, names) in _FUNCTIONS.items():
        if given is function and set(keywords) <= {*names, "reduction"}:
            return kind(**keywords)
    return None


def _of_torch(loss: Callable[[Any, Any], Tensor]) -> Loss | None:
    """A loss of torch's, or a user's module derived from one, whose reduction says how batches are put together."""
    if isinstance(loss, nn.modules.loss._Loss):
        name = type(loss).__name__
        if type(loss).__module__ == nn.modules.loss.__name__:
            return TorchLoss(loss, loss.reduction, name in _OVER_ENTRIES)
        return TorchLoss(loss, "sum", False) if loss.reduction == "sum" else None
    given: Any = loss
    function, keywords = (given.func, given.keywords) if isinstance(loss, functools.partial) else (given, {})
    name = getattr(function, "__name__", "")
    own = getattr(F, name, None) is function and (name.endswith("_loss") or name in _OVER_ENTRIES)
    if not own or not {"size_average", "reduce"}.isdisjoint(keywords):
        return None
    return TorchLoss(loss, keywords.get("reduction", "mean"), name in _OVER_ENTRIES)


_PLAIN_OPTIONS = ("ignore_index", "label_smoothing", "reduction")

_OVER_ENTRIES = {
    *("L1Loss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss", "GaussianNLLLoss", "KLDivLoss", "BCELoss", "MSELoss"),
    *("SoftMarginLoss", "HingeEmbeddingLoss", "BCEWithLogitsLoss"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss", "kl_div", "binary_cross_entropy", "mse_loss"),
    *("soft_margin_loss", "hinge_embedding_loss", "binary_cross_entropy_with_logits"),
}
"""torch's losses of which "mean" is the mean over the targets' entries, as modules and as functions."""

_OPTIONS: dict[type[KnownLoss], tuple[str, ...]] = {
    CrossEntropy: ("weight", "ignore_index", "label_smoothing"),
    MeanSquaredError: (),
    BinaryCrossEntropy: ("weight", "pos_weight"),
    NegativeLogLikelihood: ("weight", "ignore_index"),
}

_FUNCTIONS: dict[Callable[..., Tensor], tuple[type[KnownLoss], tuple[str, ...]]] = {
    getattr(F, kind.name): (kind, names) for kind, names in _OPTIONS.items()
}

_MODULES: dict[type[nn.Module], tuple[type[KnownLoss], tuple[str, ...]]] = {
    module: (kind, _OPTIONS[kind])
    for module, kind in (
        (nn.CrossEntropyLoss, CrossEntropy),
        (nn.MSELoss, MeanSquaredError),
        (nn.BCEWithLogitsLoss, BinaryCrossEntropy),
        (nn.NLLLoss, NegativeLogLikelihood),
    )
}
