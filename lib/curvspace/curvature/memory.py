"""How much memory a kept graph holds, and how much there is."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from curvspace.tensors import dense_parts, version_of

Result = TypeVar("Result")


class KeptBytes:
    """The distinct storages that a graph has saved."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The tensor without its graph, and how often it has been changed in place (the hooks switch autograd's own
        check off). autograd gives it its graph back; with it, what an operation keeps of its own result would hold that
        operation, and neither would ever be freed.
        """
        for part in dense_parts(tensor.detach()):
            storage = part.untyped_storage()
            size = min(storage.nbytes(), part.nbytes)  # a batch is often a view of the whole data set
            self._sizes[storage.data_ptr()] = max(size, self._sizes.get(storage.data_ptr(), 0))
        return tensor.detach(), version_of(tensor)

    def total(self, excluding: Iterable[Tensor] = ()) -> int:
        known = {t.untyped_storage().data_ptr() for t in excluding}
        return sum(size for pointer, size in self._sizes.items() if pointer not in known)


def with_kept_bytes(compute: Callable[[], Result]) -> tuple[Result, KeptBytes | None]:
    """What ``compute`` gives, and the storages of the tensors that autograd saves meanwhile.

    None for the storages where a model uses ``torch.func``, inside of which torch refuses to tell.
    """
    kept = KeptBytes()
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.add, _unchanged):
            return compute(), kept
    except (RuntimeError, ValueError) as error:
        if "support saved tensor hooks" not in str(error):
            raise
    return compute(), None


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if not tensor.is_inference() and tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}, expected {version}"
        )
    return tensor


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, what torch holds unused included, or available on the host."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def default_budget(device: torch.device) -> int:
    """Bytes that kept graphs may take: half of a device's free memory, a quarter of the host's."""
    return free_memory(device) // (2 if device.type == "cuda" else 4)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory has run out: torch's own, the driver's, a library's (cuBLAS) or the host's."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def let_go(error: BaseException | None) -> None:
    """Free what the calls that a caught error has ended still hold: the graph that did not fit is in the way of what is
    tried next."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
