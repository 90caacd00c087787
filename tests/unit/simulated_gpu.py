"""A second device without hardware: tensors that say ``cuda:0``, compute on the CPU, and refuse others beside them.

What they hold are CPU tensors, so that all numbers are right and branches on numbers are taken. An operation that
mixes them with tensors on the CPU is an error, as on a GPU; there, too, numbers without dimensions and indices of a
tensor may lie on the CPU. The kernels of a GPU are not simulated: see ``make gpu-check``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # what it notes of torch.cuda when it is first used must not be a stand-in
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default, aten.copy.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
_WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "nonzero",
    aten.bincount.default: "bincount",
    aten.unique_dim.default: "unique",
    aten._unique2.default: "unique",
}


class OnGPU(Tensor):
    """A tensor of the simulated device around one on the CPU. The autograd engine takes it for one of "meta"."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        layout = {"dtype": held.dtype, "layout": held.layout, "device": "meta", "requires_grad": False}
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), **layout
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=options.get("dtype", self.dtype)).to(options.get("device", self.device))

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_with_tensors(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _with_tensors(index: Any) -> Any:
    """Lists among indices as tensors, which torch makes out of reach of a dispatch mode."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list | range) else index


waits: Counter[str] = Counter()
"""How often the host waited for the device, by reason."""


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    wrappers: dict[int, OnGPU] = {}  # by what they hold: an operation in place gives its own argument back
    here: list[Tensor] = []

    def held(value: Any) -> Any:
        if isinstance(value, OnGPU):
            wrappers[id(value.held)] = value
            return value.held
        if isinstance(value, Tensor):
            here.append(value)
        return type(value)(map(held, value)) if type(value) in (list, tuple) else value

    def wrapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return wrappers[id(value)] if id(value) in wrappers else OnGPU(value)
        return type(value)(map(wrapped, value)) if type(value) in (list, tuple) else value

    asked = kwargs.get("device")
    inner_args, inner_kwargs = held(args), {key: held(value) for key, value in kwargs.items()}
    there = bool(wrappers) if asked is None else torch.device(asked).type in ("cuda", "meta")
    if wrappers and func not in _MOVES:
        strays = here if func not in _INDEXED else [t for t in here if t.dtype not in (torch.int64, torch.bool)]
        if any(t.ndim for t in strays):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")
    if func in _WAITS and wrappers:
        waits[_WAITS[func]] += 1
    elif func in _MOVES and wrappers and (here or not there):
        waits["from the host" if here and not any(args[0] is t for t in here) else "to the host"] += 1
    elif func is aten._to_copy.default and there and not wrappers:
        waits["from the host"] += 1
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if torch.Tag.inplace_view in func.tags and wrappers:
        with no_dispatch():
            func(*args, **kwargs)  # the wrapper's own shape
    return wrapped(out) if there else out


class _Mode(TorchDispatchMode):
    """For what is made on the device, of nothing that lies there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Inside, ``cuda:0`` is there."""
    generator = torch.Generator

    class Generator(generator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator.__new__(generator)

    def made_here(make: Any) -> Any:
        def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
            there = make(data, **options)
            return there if device is None else there.to(device)

        return made

    def nothing(*_: Any, **__: Any) -> None:
        pass

    waits.clear()
    stands_in = {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda index: nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "synchronize": nothing,
        "empty_cache": nothing,
        "manual_seed": nothing,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "mem_get_info": lambda device=None: (2**33, 2**34),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    with ExitStack() as stack:
        for name, value in stands_in.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.accelerator, "current_accelerator", nothing))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(patch.object(torch, name, made_here(getattr(torch, name))))
        stack.enter_context(_Mode())
        yield


def on_gpu(value: Any) -> Any:
    """Tensors (also inside tuples, lists and mappings) on the simulated device; a module in place."""
    if not isinstance(value, nn.Module):
        return tree_map_only(Tensor, lambda t: OnGPU(t.detach().clone()), value)
    new: dict[int, Tensor] = {}
    for module in value.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made = new.setdefault(id(p), nn.Parameter(OnGPU(p.detach().clone()), requires_grad=p.requires_grad))
                module._parameters[name] = made  # type: ignore[assignment]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = new.setdefault(id(b), OnGPU(b.detach().clone()))
    return value
