"""Which device a job computes on, and with what arithmetic.

One request (``auto``, ``cpu``, ``cuda``, ``cuda:1``) serves a laptop, a node with several GPUs and a cluster. Where a
process sees several GPUs, processes share them out among themselves, of all users and under any scheduler.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvspace.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def visible(count: int, environment: Mapping[str, str]) -> list[str]:
    """Names of the ``count`` visible devices that mean the same in every process of the node.

    The devices' own where torch gives them: under a scheduler the numbers of two jobs may mean different devices.
    """
    import torch

    try:
        return [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    except (AssertionError, AttributeError, RuntimeError):
        names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        return names if len(names) == count else [str(i) for i in range(count)]


@contextmanager
def claim(names: Sequence[str], space: str | Path = "curvspace") -> Iterator[int]:
    """Index of the device with the fewest other claims on it, held until the context ends.

    Never waits: with more jobs than devices each device gets a second job before any gets a third. A claim ends with
    its process, however that ends. It is the address of a socket, a name in the kernel: no folder, no user's name, no
    locks of a file system, and seen by all users of the machine (of the network name space, with containers).
    ``space`` keeps claims of different kinds apart.
    """
    for slot, (index, name) in ((slot, pair) for slot in itertools.count() for pair in enumerate(names)):
        address = hashlib.sha256(f"{space}\0{name}\0{slot}".encode()).hexdigest()
        held = _bound(f"\0curvspace-{address}")
        if held is None:
            continue
        with held:
            yield index
        return


def _bound(address: str) -> socket.socket | None:
    """A socket with this address; None if another process has it."""
    if not hasattr(socket, "AF_UNIX"):
        return _unshared()
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(address)
    except OSError as error:
        held.close()
        return None if error.errno == errno.EADDRINUSE else _unshared()
    return held


def _unshared() -> socket.socket:
    log.warning("this system cannot share out its GPUs: the first one is taken; name another with device: cuda:1")
    return socket.socket()


@contextmanager
def use(request: str, *, tf32: bool = False) -> Iterator[torch.device]:
    """The device for a request, for as long as the context lasts, with the arithmetic of :func:`reproducible`.

    ``auto`` is a GPU where there is one, else the CPU; ``cuda`` is any GPU; ``cuda:1`` that one and no other.

    Raises
    ------
    UserError
        If the request is none of these, or asks for a GPU that this machine does not have.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", request):
        raise UserError(f"device = {request!r} is not allowed; allowed: auto, cpu, cuda, cuda:0, cuda:1, …")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # a driver may be too old for this torch
    with reproducible(tf32):
        if request == "cpu" or (request == "auto" and not count):
            yield torch.device("cpu")
            return
        index = request.partition(":")[2]
        if int(index or 0) >= count:
            raise UserError(f"device = {request!r}, but this machine has {count} GPUs that torch can use")
        if index or count == 1:
            yield torch.device("cuda", int(index or 0))
            return
        with claim(visible(count, os.environ)) as chosen:
            yield torch.device("cuda", chosen)


@contextmanager
def reproducible(tf32: bool = False) -> Iterator[None]:
    """Inside, the same numbers in every run on one kind of device, in full float32; the settings are put back.

    Torch's own settings round the inputs of convolutions on recent GPUs to TF32's 10 bits, with which no noise floor
    of curvature products holds; ``tf32`` allows it, for convolutions and products alike. Of operations that have a
    deterministic form it is taken; one that has none is done all the same, with a warning of torch.
    """
    import torch

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
    import torch

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
    import torch

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
    import torch

    return {
        "tf32": any(torch._C._get_fp32_precision_getter(*one) == "tf32" for one in _PRODUCTS if one[0] == "cuda"),
        "deterministic": torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic,
        "threads": torch.get_num_threads(),
    }
