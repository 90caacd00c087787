"""With how many digits is computed: float32 in full or TF32, deterministic operations, denormal numbers as zero."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch

from curvspace.denormals import flushed_on


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Inside, whatever surrounds it: tensors compute in their own types, float32 with all its digits (no autocast, no
    TF32), and a CPU takes denormal numbers for zero."""
    with torch.autocast(device.type, enabled=False), full_float32(device), flushed_on(device):
        yield


def in_own_arithmetic(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, whose first argument has a ``device``, computes in :func:`own_arithmetic`."""

    @wraps(f)
    def plain(first: Any, *args: Any, **kwargs: Any) -> Any:
        with own_arithmetic(torch.device(first.device)):
            return f(first, *args, **kwargs)

    return plain


@contextmanager
def reproducible(tf32: bool = False) -> Iterator[None]:
    """Inside, the same numbers in every run on one kind of device, in full float32; the settings are put back.

    Torch's own settings round the inputs of convolutions on recent GPUs to TF32's 10 bits, with which no noise floor
    of curvature products holds; ``tf32`` allows it, for convolutions and products alike. Of operations that have a
    deterministic form it is taken; one that has none is done all the same, with a warning of torch.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
    debug: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    mode, fill = torch.get_deterministic_debug_mode(), debug.fill_uninitialized_memory
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        debug.fill_uninitialized_memory = False
        torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports the compiler: over a second
        with _float32_by(tf32):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        debug.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


_PRODUCTS = [(backend, of) for backend in ("cuda", "mkldnn") for of in ("matmul", "conv", "rnn")]
"""What torch has a setting for, of a GPU and of a CPU."""


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, products and convolutions on this kind of device have all digits of float32; then as it was set."""
    backend = "cuda" if device.type == "cuda" else "mkldnn"
    if all(torch._C._get_fp32_precision_getter(*one) in ("none", "ieee") for one in _PRODUCTS if one[0] == backend):
        yield
        return
    with _float32_by(False):
        yield


def require_float64(device: torch.device) -> None:
    """Sums over many entries are in float64. Raise ``ValueError`` for Apple's GPUs, which have no such numbers."""
    if device.type == "mps":
        raise ValueError("the model is on mps, which has no float64; curvature needs it: move the model to the CPU")


@contextmanager
def _float32_by(tf32: bool) -> Iterator[None]:
    """Torch's settings of TF32, of both kinds: the older ones raise where they are read after the newer were set, and
    one that is off is on all the same where ``torch.backends.fp32_precision``, which it inherits, is."""
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    newer = {one: read(*one) for one in _PRODUCTS}
    products = convolutions = None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        for one in [] if tf32 else _PRODUCTS:
            write(*one, "ieee")
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for one, value in newer.items():
            write(*one, "none")
            if read(*one) != value:  # else it was, or might as well have been, inherited
                write(*one, value)


def arithmetic() -> dict[str, Any]:
    """The present settings that decide about digits, for a record."""
    return {
        "tf32": any(torch._C._get_fp32_precision_getter(*one) == "tf32" for one in _PRODUCTS if one[0] == "cuda"),
        "deterministic": torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic,
        "threads": torch.get_num_threads(),
    }
