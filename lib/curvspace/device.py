"""Which device a job computes on.

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
from contextlib import contextmanager
from pathlib import Path

import torch

from curvspace.arithmetic import reproducible
from curvspace.errors import UserError

log = logging.getLogger(__name__)


def visible(count: int, environment: Mapping[str, str]) -> list[str]:
    """Names of the ``count`` visible devices that mean the same in every process of the node.

    The devices' own where torch gives them: under a scheduler the numbers of two jobs may mean different devices.
    """
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
