"""Which device a job computes on.

One request (``auto``, ``cpu``, ``cuda``, ``cuda:1``) serves a laptop, a node with several GPUs and a cluster. On a
node with several GPUs, where nobody assigns them, jobs share them out by file locks. A scheduler's assignment
(``CUDA_VISIBLE_DEVICES`` set by Slurm) is left alone.
"""

from __future__ import annotations

import getpass
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from curvspace.errors import UserError

if TYPE_CHECKING:
    import torch


def visible(count: int, environment: Mapping[str, str]) -> list[str]:
    """Names of the ``count`` visible devices that mean the same in every process of the node."""
    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names if len(names) == count else [str(i) for i in range(count)]


@contextmanager
def claim(names: Sequence[str], folder: Path) -> Iterator[int]:
    """Index of the device with the fewest other claims on it, held until the context ends.

    Never waits: with more jobs than devices each device gets a second job before any gets a third. A claim ends
    with its process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for slot, (index, name) in ((slot, pair) for slot in itertools.count() for pair in enumerate(names)):
        lock = FileLock(folder / f"gpu-{re.sub('[^A-Za-z0-9-]', '_', name)}-{slot}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield index
        finally:
            lock.release()
        return


@contextmanager
def use(request: str) -> Iterator[torch.device]:
    """The device for a request, for as long as the context lasts.

    ``auto`` is a GPU where there is one, else the CPU; ``cuda`` is any GPU; ``cuda:1`` that one and no other.

    Raises
    ------
    UserError
        If the request is none of these, or asks for a GPU that this machine does not have.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", request):
        raise UserError(f"device = {request!r} is not allowed; allowed: auto, cpu, cuda, cuda:0, cuda:1, …")
    count = torch.cuda.device_count()
    if request == "cpu" or (request == "auto" and not count):
        yield torch.device("cpu")
        return
    index = request.partition(":")[2]
    if int(index or 0) >= count:
        raise UserError(f"device = {request!r}, but this machine has {count} GPUs that torch can use")
    if index or count == 1 or "SLURM_JOB_ID" in os.environ:
        yield torch.device("cuda", int(index or 0))
        return
    folder = Path(tempfile.gettempdir()) / f"curvspace-{getpass.getuser()}"
    with claim(visible(count, os.environ), folder) as chosen:
        yield torch.device("cuda", chosen)
