"""Seeds of all that is drawn at random."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from a run's seed, a purpose and a counter: ``derived_seed(0, "order", epoch)``.

    Every random draw of a run comes from a generator seeded so: order, initialisation, augmentation and dropout
    never share a stream, and the place in training alone says what is drawn, so that a resumed run needs no
    generator state to continue bit for bit.
    """
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that a model on ``device`` draws from, and no other device's.

    ``torch.manual_seed`` asks every kind of device there is: 1.4 ms a call where torch was built for GPUs and has none.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


@contextmanager
def replayed_randomness(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Draws inside (dropout) come from ``seed``, or from the present state, and leave the generators as they were.

    Two passes, each inside its own such block entered at the same state, see the same dropout masks.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            seed_generators(seed, device)
        yield


def generator_states(device: torch.device) -> list[Any]:
    """The states of the generators that a model may draw from."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    others = pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: NPY002  the one that a model would use
    return [*(bytes(state.numpy()) for state in states), others]
