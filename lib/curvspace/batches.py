"""The forms in which a user may give batches, made one: pairs (inputs, targets); how many examples a batch has, and
which of its tensors have them along their first dimension."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from curvspace.inputs import Inputs, all_plain, map_tensors, mapping_like, sequence_like, tensors_in

Batched = Collection[int | str] | None
"""Which inputs have the batch as their first dimension, by position or name; ``None``: those of that length."""

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
    lengths = _lengths(targets)
    if not lengths:
        raise ValueError(
            f"the targets of batch {index} have no batch dimension; give one example as (x[None], y[None]), "
            "a data set through a DataLoader"
        )
    fitting = _numbers_of_examples(inputs, targets, batched)
    n = fitting[0] if fitting else lengths[0]
    if n == 0:
        raise ValueError(f"batch {index} is empty")
    if not fitting and batched is None:
        rows = next((n for entry in _entries(inputs) for n in _lengths(entry)), "no")
        raise ValueError(
            f"batch {index} has {rows} inputs but {n} targets; if no input has the examples along its first dimension, "
            "pass batched=(); a list or tuple is several inputs, model(*x): one that is a single input is (x,)"
        )
    return n, (*batch_flags(inputs, n, batched), *batch_flags(targets, n))


def require_known_sizes(
    pairs: Sequence[tuple[Inputs, Any]], batched: Batched, weight: Callable[[Any, int], float]
) -> None:
    """Raise ``ValueError`` where several batches' weights depend on which length is the number of examples, and that
    is not certain."""
    found = [[n for n in _numbers_of_examples(x, y, batched) if n] for x, y in pairs]
    for i, ((_, y), numbers) in enumerate(zip(pairs, found, strict=True)):
        if len({weight(y, n) for n in numbers}) > 1 and any(others != numbers for others in found):
            raise ValueError(
                f"batch {i}: its number of examples may be {' or '.join(map(str, numbers))}, by which batches are put "
                "together; say which inputs have the examples along their first dimension (batched=[0]), or give as "
                "targets tensors that all have them"
            )


def _numbers_of_examples(inputs: Inputs, targets: Any, batched: Batched) -> list[int]:
    """What the number of examples may be: lengths of the targets that inputs have too, where they are to have it.

    Targets of one entry an example (a list of mappings, or of tensors of different lengths) are as many as these are,
    where that fits the inputs.
    """
    lengths = _lengths(targets)
    chosen = {k: v for k, v in _by_key(inputs).items() if batched is None or k in batched}
    there = {n for entry in chosen.values() for n in (*_lengths(entry), *_entries_of_a_list(entry))}
    if not there and not batched:  # an object that the model knows, or inputs said to be of no length
        there = set(lengths)
    if _one_an_example(targets) and len(targets) in there:
        return [len(targets)]
    return [n for n in lengths if n in there]


def number_of_examples(inputs: Inputs, targets: Any) -> int:
    """How many examples a batch has: by targets and inputs where they agree, else by the targets."""
    fitting = _numbers_of_examples(inputs, targets, None)
    return fitting[0] if fitting else batch_size(targets)


def fit(inputs: Inputs, targets: Any) -> bool:
    """Whether some input has as many examples as there are targets, or none is a tensor."""
    return bool(_numbers_of_examples(inputs, targets, None))


def _lengths(value: Any) -> list[int]:
    """First dimensions of the tensors in it, each once; before them of a list of one entry an example its length."""
    if isinstance(value, PackedSequence):
        return [len(value.data)]
    rows = [t.size(0) for t in tensors_in(value) if t.ndim]
    return list(dict.fromkeys([len(value), *rows] if _one_an_example(value) else rows))


def _entries_of_a_list(value: Any) -> list[int]:
    """How many examples a list as one input may have, or packed sequences."""
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]
    return [len(value)] if isinstance(value, list) else []


def _one_an_example(value: Any) -> bool:
    """Whether a list seems to have an entry an example: mappings, numbers, or tensors of different lengths."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(entry, Mapping) for entry in value):
        return True
    if all(isinstance(entry, Tensor) for entry in value):
        return len({t.size(0) if t.ndim else None for t in value}) > 1 or value[0].ndim == 0
    return all(isinstance(entry, int | float) for entry in value)


def _by_key(inputs: Inputs) -> dict[Any, Any]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return dict(
        enumerate(inputs if isinstance(inputs, list | tuple) and not isinstance(inputs, PackedSequence) else [inputs])
    )


def _entries(inputs: Inputs) -> list[Any]:
    return list(_by_key(inputs).values())


def batch_size(value: Any) -> int:
    """Number of examples among inputs or targets: of a list of one entry an example its length, else the first
    dimension of the first tensor that has one.

    Raises
    ------
    ValueError
        If there is no such tensor.
    """
    lengths = _lengths(value)
    if not lengths:
        raise ValueError("a batch holds no tensor with a first dimension, so its number of examples is unknown")
    return lengths[0]


def batch_flags(value: Any, size: int, batched: Batched = None) -> tuple[bool, ...]:
    """Which tensors of inputs (or targets) have ``size`` examples along their first dimension, in order.

    Those in the entries that ``batched`` names by position or key; without it, those whose first dimension is ``size``
    and that are dense (a sparse one has a row an example where it joins examples: a graph; nested ones are not cut).

    Raises
    ------
    ValueError
        If there is no such entry, or it is not ``size`` long, or no tensor.
    """
    if batched is None:
        return tuple(_is_dense(t) and t.ndim > 0 and t.shape[0] == size for t in tensors_in(value))
    entries = _by_key(value)
    unknown = [key for key in batched if key not in entries]
    if unknown:
        raise ValueError(f"batched names {unknown[0]!r}, but the inputs are {list(entries)}")
    flags: list[bool] = []
    for key, entry in entries.items():
        if key in batched and has_uncut_examples(entry, size):
            raise ValueError(f"batched names {key!r}, which holds what is no tensor: only tensors are cut, make it one")
        for t in tensors_in(entry):
            if key in batched and (t.ndim == 0 or t.size(0) != size):
                raise ValueError(f"batched names {key!r} of shape {tuple(t.shape)}, but there are {size} targets")
            flags.append(key in batched and not t.is_nested)
    return tuple(flags)


def _is_dense(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_nested


def take(value: Any, index: Tensor | slice, flags: Sequence[bool]) -> Any:
    """The examples ``index`` of inputs or targets: tensors with a flag are cut, the others (masks, scalars) stay."""
    remaining = iter(flags)

    def one(t: Tensor) -> Tensor:
        if not next(remaining):
            return t
        return t[index.to(t.device) if isinstance(index, Tensor) else index]

    return map_tensors(one, value)


def has_uncut_examples(value: Any, size: int) -> bool:
    """Whether inputs or targets hold something of each of ``size`` examples that :func:`take` leaves whole: what is no
    tensor (a list of lengths, an array), or a list of one entry an example."""
    if isinstance(value, Tensor):
        return value.is_nested and value.size(0) == size
    if isinstance(value, str | bytes) or getattr(value, "ndim", 1) == 0:
        return False
    if isinstance(value, Sized) and len(value) == size and (not tensors_in(value) or _one_an_example(value)):
        return True
    if all_plain(value):
        return False
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(has_uncut_examples(entry, size) for entry in entries)


def select(value: Any, index: Tensor | slice, *, size: int | None = None, batched: Batched = None) -> Any:
    """The examples ``index`` of inputs (or targets) of ``size`` examples, by default that of the first tensor.

    Raises
    ------
    ValueError
        If something of each example cannot be cut.
    """
    n = batch_size(value) if size is None else size
    if has_uncut_examples(value, n):
        raise ValueError(f"of a batch of {n} examples a part cannot be taken: only tensors are cut, no lists")
    return take(value, index, batch_flags(value, n, batched))


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
    """NumPy arrays of numbers as tensors, also inside tuples and mappings."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.as_tensor(value, device="cpu")
    if isinstance(value, Mapping):
        return mapping_like(value, {k: _as_tensors(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return sequence_like(value, (_as_tensors(v) for v in value))
    return value
