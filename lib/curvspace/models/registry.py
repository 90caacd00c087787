"""Networks by name. Each kind is imported from one module, so a change to it touches only its own runs."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvspace.errors import refuse_text

if TYPE_CHECKING:
    from torch import nn

KINDS = {
    "resnet9": "curvspace.models.resnet9:resnet9",
    "resnet18": "curvspace.models.resnet18:resnet18",
    "cnn-60k": "curvspace.models.small_cnn:cnn_60k",
    "cnn-400": "curvspace.models.small_cnn:cnn_400",
    "cnn-222": "curvspace.models.small_cnn:cnn_222",
    "fc": "curvspace.models.fully_connected:fc",
    "softmax": "curvspace.models.fully_connected:softmax",
    "mlp-tanh": "curvspace.models.fully_connected:mlp_tanh",
    "convnet": "curvspace.models.convnet:convnet",
    "lenet": "curvspace.models.lenet:lenet",
    "cifar-basic": "curvspace.models.cifar_basic:cifar_basic",
    "vgg-f": "curvspace.models.vgg_f:vgg_f",
}
"""Kind -> ``module:function``. A function takes ``(input_shape, num_classes, **options)`` and returns the module."""


def module_of(kind: str) -> str:
    """The one module that defines a kind: ``module_of("fc") == "curvspace.models.fully_connected"``.

    Raises
    ------
    ValueError
        If the kind is neither registered nor of the form ``module:function``.
    """
    return _target(kind)[0]


def build(kind: str, options: Mapping[str, Any] | None, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A freshly initialised network on the CPU, in float32 and train mode.

    Parameters
    ----------
    kind
        One of :data:`KINDS`, or ``"module:function"`` for a user's own, called in the same way as ours:
        ``function(input_shape, num_classes, **options)``.
    options
        Keyword arguments of that function (for example ``{"width": 16}``).
    input_shape
        Shape of one example, without the batch: (C, H, W) for images, (d,) for vectors.
    num_classes
        Number of outputs (1 for a regression on one target).

    Weights are drawn from torch's global generator, so ``torch.manual_seed`` before the call fixes them.

    Raises
    ------
    ValueError
        If the kind or one of the options is unknown or makes no network, or the input is too small for it.
    """
    module_name, function_name = _target(kind)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise  # the user's module exists; something that it imports does not
        raise ValueError(f"model kind {kind!r}: there is no module {module_name!r} on Python's path") from error
    except AttributeError as error:
        raise ValueError(f"model kind {kind!r}: module {module_name!r} has no function {function_name!r}") from error
    options = dict(options or {})
    signature = inspect.signature(function)
    try:
        signature.bind(tuple(input_shape), num_classes, **options)
    except TypeError as error:
        raise ValueError(f"model kind {kind!r} does not take the options {options}: {error}") from None
    refuse_text(f"model kind {kind!r}", function, options)
    if kind not in KINDS:
        return function(tuple(input_shape), num_classes, **options)
    given = f"model kind {kind!r}" + "".join(f", {name} = {value!r}" for name, value in options.items())
    for name, value in options.items():
        if signature.parameters[name].annotation in ("bool", bool) and not isinstance(value, bool):
            raise ValueError(f"{given}: {name} is True or False")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{given}: {name} is not finite")
    try:
        model: nn.Module = function(tuple(input_shape), num_classes, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{given}: {error}" if options else str(error)) from error
    if empty := [name for name, parameter in model.named_parameters() if not parameter.numel()]:
        raise ValueError(f"{given}: parameter {empty[0]} has no entries")
    return model


def _target(kind: str) -> tuple[str, str]:
    target = KINDS.get(kind, kind)
    module_name, separator, function_name = target.partition(":")
    if not (module_name and separator and function_name):
        raise ValueError(f"unknown model kind {kind!r}; known are {', '.join(sorted(KINDS))}, or 'module:function'")
    return module_name, function_name
