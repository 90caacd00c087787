"""Models run as they are written, by kernels that have all derivatives: not compiled, not checkpointed, not fused."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from curvspace.threads import ALONE


@contextmanager
def as_written() -> Iterator[None]:
    """Checkpointed and compiled parts of a model run as they are written, which all derivatives need."""
    with ALONE, without_checkpointing(), _without_compilation():
        yield


@contextmanager
def without_cached_weights() -> Iterator[None]:
    """Parametrised weights are those of the parameters in force: inside ``parametrize.cached()`` others may be kept."""
    saved = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = saved


@contextmanager
def plain_kernels(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Attention and recurrent layers among the modules by the kernels that have all derivatives.

    cuDNN's recurrent layers have no second derivatives, no forward-mode rule, and in evaluation mode no first ones.
    """
    with ALONE, sdpa_kernel(SDPBackend.MATH):
        cudnn, fast_path = torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if any(isinstance(m, nn.RNNBase) for m in modules):
                torch.backends.cudnn.enabled = False
            yield
        finally:
            torch.backends.cudnn.enabled = cudnn
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Activations are kept: recomputing them would call the module outside of the evaluation, as it is then."""
    checkpoint = sys.modules.get("torch.utils.checkpoint")
    generators = [name for name in vars(checkpoint or object) if name.startswith("_checkpoint_without_reentrant_gen")]
    stand_ins: dict[str, Any] = dict.fromkeys(generators, _nothing_around)
    if hasattr(checkpoint, "CheckpointFunction"):
        stand_ins["CheckpointFunction"] = _PlainCall
    saved = {name: getattr(checkpoint, name) for name in stand_ins}
    try:
        for name, value in stand_ins.items():
            setattr(checkpoint, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(checkpoint, name, value)


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    """What a checkpointed call does before and after it: nothing."""
    yield


class _PlainCall:
    """Stands in for ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Any, preserve: bool, *inputs: Any) -> Any:
        return function(*inputs)


@contextmanager
def _without_compilation() -> Iterator[None]:
    """Compiled parts run as written: what the compiler makes has no second derivatives."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
