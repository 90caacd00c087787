"""The random numbers that a model draws (dropout masks): whether it drew any, and the same ones again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators that a model on this device draws from."""
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


@contextmanager
def randomness_from(state: tuple[Tensor, ...], device: torch.device) -> Iterator[None]:
    """Draws inside come from this state, and leave the generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_random_state(state, device)
        yield


def set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    """Put the generators back to a state that :func:`random_state` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
