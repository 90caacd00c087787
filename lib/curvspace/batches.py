"""The forms in which a user may give batches, made one: pairs (inputs, targets)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvspace.inputs import Batched, Inputs, batch_flags, batch_size, tensors_in, tuple_like

LABELS = ("labels", "label", "targets", "target")
"""Keys under which a mapping may hold its targets."""


def as_pairs(batches: Any) -> list[tuple[Inputs, Any]]:
    """Pairs (inputs, targets) from an iterable of batches, or from one batch.

    A batch is a pair, or a mapping of which one entry is called ``labels`` (``label``, ``targets``, ``target``).

    Reading them leaves the generators of torch (on the CPU), NumPy and Python as they were, and a loader's own.

    Raises
    ------
    ValueError
        If there is none, one has another form, or one was overwritten while later ones were read.
    """
    if isinstance(batches, Mapping) or _is_bare_pair(batches):
        batches = [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | str):
        raise ValueError(f"batches must be pairs (inputs, targets), got a {type(batches).__name__}")
    pairs, traces = [], []
    with _preserved_generators(batches):
        for i, batch in enumerate(batches):
            pairs.append(_pair(i, batch))
            traces.append([] if isinstance(batches, list | tuple) else _traces(pairs[-1]))
    if not pairs:
        raise ValueError("an objective needs at least one batch, got none")
    for i, (pair, before) in enumerate(zip(pairs, traces, strict=True)):
        if before and _traces(pair) != before:
            raise ValueError(
                f"batch {i} was overwritten while later ones were read: the iterable uses its tensors again; let it "
                "yield new ones (tensor.clone(), array.copy())"
            )
    return pairs


@contextmanager
def _preserved_generators(batches: Any) -> Iterator[None]:
    """Whatever is drawn inside (a loader's order, augmentations) leaves no trace in the user's generators."""
    grouped = getattr(batches, "batch_sampler", None)
    holders = (batches, getattr(batches, "sampler", None), grouped, getattr(grouped, "sampler", None))
    own = {id(g): g for g in (getattr(h, "generator", None) for h in holders) if isinstance(g, torch.Generator)}
    states = [(g, g.get_state()) for g in own.values()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's, whatever its kind)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in states:
            generator.set_state(state)


def _traces(pair: tuple[Inputs, Any]) -> list[tuple[int, bytes]]:
    """Of each tensor how often it was changed in place, and the first and last examples: its memory has other users."""
    return [(0 if t.is_inference() else t._version, _ends(t)) for t in tensors_in(pair)]


def _ends(t: Tensor) -> bytes:
    if t.layout != torch.strided or t.is_quantized or not t.numel():
        return b""
    rows = (t[:1], t[-1:]) if t.ndim else (t,)
    return b"".join(
        bytes(r.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())
        for r in rows
    )


def layout(index: int, inputs: Inputs, targets: Any, batched: Batched) -> tuple[int, tuple[bool, ...]]:
    """Examples of a batch (as many as targets), and which tensors of inputs and targets have one a row, in order.

    Raises
    ------
    ValueError
        If the batch is empty, or inputs and targets do not fit together.
    """
    if all(t.ndim == 0 for t in tensors_in(targets)):
        raise ValueError(
            f"the targets of batch {index} have no batch dimension; give one example as (x[None], y[None]), "
            "a data set through a DataLoader"
        )
    n = batch_size(targets)
    if n == 0:
        raise ValueError(f"batch {index} is empty")
    flags = batch_flags(inputs, n, batched)
    if batched is None and not any(flags):
        found = tensors_in(inputs)
        if not found:  # an object that the model knows
            return n, (*flags, *batch_flags(targets, n))
        rows = found[0].shape[0] if found[0].ndim else "no"
        raise ValueError(
            f"batch {index} has {rows} inputs but {n} targets; if no input has the examples along its first dimension, "
            "pass batched=(); a list or tuple is several inputs, model(*x): one that is a single input is (x,)"
        )
    return n, (*flags, *batch_flags(targets, n))


def could_be_one_example(inputs: Inputs, targets: Any) -> bool:
    """Whether a pair may be a single example without batch dimension: real inputs and targets, all of one dimension."""
    tensors = [*tensors_in(inputs), *tensors_in(targets)]
    return bool(tensors_in(inputs)) and all(t.ndim == 1 and t.is_floating_point() for t in tensors)


def one_example(index: int, inputs: Inputs, targets: Any) -> str:
    """What to say where a pair is one."""
    x, y = (", ".join(str(tuple(t.shape)) for t in tensors_in(value)) for value in (inputs, targets))
    return (
        f"batch {index}, inputs {x} and targets {y}, seems to be one example without a batch dimension: the model does "
        "not take fewer of them; give one example as (x[None], y[None]), a data set through a DataLoader, or say which "
        "inputs have the examples along their first dimension (batched=[0]; none: ())"
    )


def _is_bare_pair(batches: Any) -> bool:
    return isinstance(batches, list | tuple) and len(batches) == 2 and any(_is_array(part) for part in batches)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _pair(index: int, batch: Any) -> tuple[Inputs, Any]:
    if isinstance(batch, Mapping):
        keys = [key for key in batch if key in LABELS]
        if len(keys) != 1:
            raise ValueError(
                f"batch {index} is a mapping with keys {list(batch)}; "
                f"its targets must be under one of {', '.join(LABELS)}"
            )
        inputs: Any = {key: value for key, value in batch.items() if key != keys[0]}
        targets = batch[keys[0]]
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, targets = batch
    else:
        form = f"{len(batch)} entries" if isinstance(batch, list | tuple) else f"the type {type(batch).__name__}"
        raise ValueError(
            f"batch {index} has {form}; give pairs (inputs, targets), several inputs or targets in a tuple"
        )
    return _as_tensors(inputs), _as_tensors(targets)


def _as_tensors(value: Any) -> Any:
    """NumPy arrays as tensors, also inside tuples and mappings."""
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value, device="cpu")
    if isinstance(value, Mapping):
        return {k: _as_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple_like(value, (_as_tensors(v) for v in value))
    return value
