"""One evaluation at a time, whichever thread asks.

While it lasts, an evaluation gives a module other parameters and modes, and changes switches that all threads of a
process share (generators, attention kernels, checkpoints): two at once would take each other's for the user's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

ALONE = threading.RLock()


def one_at_a_time(f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``f`` waits for what other threads evaluate here."""

    @wraps(f)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ALONE:
            return f(*args, **kwargs)

    return alone
