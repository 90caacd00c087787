"""Optimisers by the name that a config uses.

Each kind is loaded from one module, so that a change to one optimiser concerns the runs of that optimiser alone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from curvspace.errors import refuse_text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from curvspace.losses import Loss
    from curvspace.optim.base import ModelOptimizer

KINDS = {
    "sgd": "curvspace.optim.first_order:sgd",
    "adam": "curvspace.optim.first_order:adam",
    "rmsprop": "curvspace.optim.first_order:rmsprop",
    "muon": "curvspace.optim.first_order:muon",
    "class-gradient-newton": "curvspace.optim.configurations:class_gradient_newton",
    "rayleigh-ritz-newton": "curvspace.optim.configurations:rayleigh_ritz_newton",
    "low-rank-newton": "curvspace.optim.configurations:low_rank_newton",
    "bulk-sgd": "curvspace.optim.configurations:bulk_sgd",
    "dominant-sgd": "curvspace.optim.configurations:dominant_sgd",
    "span-filter": "curvspace.optim.span_filter:span_filter",
    "fosi": "curvspace.optim.rivals:fosi",
    "nudged-sgd": "curvspace.optim.rivals:nudged_sgd",
    "bsfa": "curvspace.optim.rivals:bsfa",
    "gradient-centralisation": "curvspace.optim.rivals:gradient_centralisation",
    "curveball": "curvspace.optim.curveball:CurveBall",
    "levenberg-marquardt": "curvspace.optim.levenberg_marquardt:LevenbergMarquardt",
    "negative-curvature": "curvspace.optim.negative_curvature:NegativeCurvature",
}
"""Kind -> ``module:function`` (or class). Plain text: the pipeline reads this table without importing anything."""


WRAPPER = "curvspace.optim.first_order:FirstOrder"
"""What gives a class of optimisers from elsewhere its ``step(inputs, targets)``."""


def module_of(kind: str) -> str:
    """The module that a kind is loaded from: ``"curveball"`` -> ``"curvspace.optim.curveball"``.

    Raises
    ------
    ValueError
        If the kind is neither known nor of the form ``module:function``.
    """
    return _place(kind)[0]


def build(
    kind: str,
    options: Mapping[str, Any],
    model: nn.Module,
    num_classes: int,
    lr: float,
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    seed: int | None = None,
) -> ModelOptimizer:
    """The optimiser of a config entry: ``kind``, its other ``options``, and the run's learning rate and loss.

    A function or class of the user's own (``module:function``) is called as ``f(model, lr=..., loss=..., **options)``.
    Any other class of optimisers, of ``torch.optim``, ``pytorch_optimizer``, ``schedulefree`` or elsewhere
    (``"torch.optim:NAdam"``), is wrapped in :class:`~curvspace.optim.first_order.FirstOrder`.
    ``num_classes`` is passed where the signature has it; where it has ``k``, that is C unless the options give it, and
    where it has ``seed``, that is the one given here.

    Raises
    ------
    ValueError
        If the kind or an option is unknown, or a value out of range; the message names it.
    """
    function = _found(kind)
    if _is_foreign(function):
        wrapper, name = WRAPPER.split(":")
        function = partial(getattr(importlib.import_module(wrapper), name), optimizer=function)
    parameters = inspect.signature(function).parameters
    values = dict(options)
    if "num_classes" in parameters:
        values.setdefault("num_classes", num_classes)
    if "k" in parameters and parameters["k"].default is inspect.Parameter.empty:
        values.setdefault("k", num_classes)
    if "seed" in parameters and seed is not None:
        values.setdefault("seed", seed)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [] if takes_any else [key for key in options if key not in parameters]
    if unknown:
        raise ValueError(f"optimizer kind {kind!r} has no option {unknown[0]!r}; it has {', '.join(parameters)}")
    refuse_text(f"optimizer kind {kind!r}", function, options)
    try:
        return function(model, lr=lr, loss=loss, **values)
    except TypeError as error:  # an option that a wrapped optimiser does not know
        raise ValueError(f"optimizer kind {kind!r}: {error}") from error


def _found(kind: str) -> Any:
    module, name = _place(kind)
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"optimizer kind {kind!r}: {error}; is the package installed?") from error
    if function is None:
        raise ValueError(f"optimizer kind {kind!r}: module {module} has no {name!r}")
    return function


def _is_foreign(function: Any) -> bool:
    """Whether it is a class of optimisers that step from ``.grad``, without ``step(inputs, targets)``."""
    bases = {f"{base.__module__}.{base.__name__}" for base in getattr(function, "__mro__", ())}
    return "torch.optim.optimizer.Optimizer" in bases and "curvspace.optim.base.ModelOptimizer" not in bases


def _place(kind: str) -> tuple[str, str]:
    module, colon, name = KINDS.get(kind, kind).partition(":")
    if kind.replace("_", "-") in KINDS and kind not in KINDS:
        raise ValueError(f"optimizer kind {kind!r} is now {kind.replace('_', '-')!r}")
    if not (module and colon and name):
        raise ValueError(f"unknown optimizer kind {kind!r}; use one of {', '.join(sorted(KINDS))}, or module:function")
    return module, name
