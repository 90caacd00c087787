"""Denormal numbers flushed to zero, in all threads, for as long as this package computes.

In a network that fits its data most gradients of single examples are tiny, and a CPU computes with numbers below 1e-38
(float32) many times more slowly than with others: on one such network a gradient took ten times as long as with these
numbers set to zero. torch has the switch, ``torch.set_flush_denormal``, but it works for the calling thread alone:
threads of torch's pool keep what they had when the pool started. So the switch is set in each of them, through the
OpenMP library that runs the pool.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

_HALF = 0.5
_inside = threading.local()


@contextmanager
def flushed() -> Iterator[None]:
    """Within the block (or the decorated function) denormal numbers are zero; afterwards each thread is as it was.

    Threads that the user started compute as before. Where the processor has no such mode, or torch's threads do not
    come from OpenMP on Linux, only what can be set is set: results differ in numbers below 1e-38 alone.
    """
    if getattr(_inside, "depth", 0):
        yield
        return
    before: dict[int, bool] = {}

    def begin() -> None:
        before[threading.get_ident()] = is_flushing()
        torch.set_flush_denormal(True)

    def end() -> None:
        torch.set_flush_denormal(before.get(threading.get_ident(), False))

    _inside.depth = 1
    _in_each_thread(begin)
    try:
        yield
    finally:
        _in_each_thread(end)
        _inside.depth = 0


def flushed_on(device: torch.device) -> AbstractContextManager[None]:
    """:func:`flushed` where a CPU computes; a GPU has no such mode, and its host has many threads to set."""
    return flushed() if device.type == "cpu" else nullcontext()


def is_flushing() -> bool:
    """Whether the calling thread takes denormal numbers for zero."""
    return sys.float_info.min * _HALF == 0.0


def _in_each_thread(work: Callable[[], None]) -> None:
    """Call work in this thread and in those of torch's pool."""
    parallel = _parallel() if torch.get_num_threads() > 1 else None
    if parallel is None:
        work()
        return
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: work())
    parallel(call, None, torch.get_num_threads(), 0)


@cache
def _parallel() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded, or None."""
    try:
        with open("/proc/self/maps") as lines:
            paths = {line.split()[-1] for line in lines if any(n in line for n in ("libgomp", "libiomp5", "libomp"))}
    except OSError:
        return None
    for path in sorted(paths, key=lambda p: "torch" not in p):
        try:
            return ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None
