r"""A model as a function of one flat parameter vector.

With the trainable parameters of a module written as one vector :math:`\theta \in \mathbb{R}^P`, in
``named_parameters()`` order (parameters with ``requires_grad=False`` are constants, tied ones count once),

.. math:: z = \phi(\theta, x).

Everything in the library that moves in parameter space goes through these few functions.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from curvspace.denormals import flushed_on
from curvspace.device import full_float32
from curvspace.threads import one_at_a_time

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor (``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``)."""

Batched = Collection[int | str] | None
"""Which inputs have the batch as their first dimension, by position or name; ``None``: those of that length."""


@one_at_a_time
def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, in ``named_parameters()`` order.

    Raises
    ------
    ValueError
        If there are none, or one is complex.
    """
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad=True; nothing to differentiate: "
            "for a frozen copy (an average of weights) call its requires_grad_()"
        )
    for name, p in found.items():
        if p.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex; keep its real and imaginary parts in a real one (torch.view_as_real)"
            )
    return found


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors, one after the other, as one vector (P,)."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Views of a vector (P,) in the shapes of ``like``: the inverse of :func:`flatten`.

    Raises
    ------
    ValueError
        If the vector's length is not the number of entries of ``like``.
    """
    shapes = [t.shape for t in like]
    sizes = [s.numel() for s in shapes]
    if vector.ndim != 1 or vector.shape[0] != sum(sizes):
        raise ValueError(f"expected a vector of {sum(sizes)} entries, got shape {tuple(vector.shape)}")
    return tuple(part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True))


def parameter_vector(model: nn.Module) -> Tensor:
    """A detached copy of the trainable parameters as one vector (P,)."""
    return flatten(p.detach() for p in trainable_parameters(model).values())


@torch.no_grad()
def add_to_parameters(model: nn.Module, vector: Tensor, alpha: float = 1.0) -> None:
    r"""In place, :math:`\theta \leftarrow \theta + \alpha v` for a flat vector v (P,)."""
    parameters = list(trainable_parameters(model).values())
    torch._foreach_add_(parameters, list(unflatten(vector, parameters)), alpha=alpha)


@torch.no_grad()
def assign_parameters(model: nn.Module, vector: Tensor) -> None:
    r"""In place, :math:`\theta \leftarrow v` for a flat vector v (P,)."""
    parameters = list(trainable_parameters(model).values())
    for p, value in zip(parameters, unflatten(vector, parameters), strict=True):
        p.copy_(value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers: the same parameters, same order."""
    while True:
        if type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model(x)``, ``model(*x)`` or ``model(**x)`` for a tensor (or an object of another kind, or a packed sequence),
    a tuple, a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


@contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named parameters and buffers of the model are these tensors, under all of their names.

    What ``torch.func.functional_call`` does, but the loss may read the model's parameters too, and a module that
    has two names keeps its own ``nn.Parameter`` objects (there they come back as plain tensors).

    Raises
    ------
    ValueError
        If a name is not one of the model's.
    """
    present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unknown = [name for name in tensors if name not in present]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no parameter or buffer named {unknown[0]!r}")
    replacements = {id(present[name]): tensor for name, tensor in tensors.items()}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, value in store.items():
                    if value is not None and id(value) in replacements:
                        swapped.append((store, name, value))
                        store[name] = replacements[id(value)]  # type: ignore[assignment]
        yield
    finally:
        for store, name, value in swapped:
            store[name] = value


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Call the model with the named parameters and buffers replaced by ``tensors``."""
    with substituted(model, tensors):
        return call(model, inputs)


_LISTS = frozenset({list, tuple, dict, OrderedDict, defaultdict})
_HELD = frozenset({*_LISTS, set, deque, Tensor, np.ndarray})
_ITS_OWN = frozenset(nn.Module().__dict__)
_LARGEST, _LONGEST = 2**20, 1024
"""Bytes of a tensor, and entries of a list, up to which they are copied and looked through."""


def modules_within(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, and after them those that only its lists and dictionaries hold, unseen by PyTorch."""
    holdings, _ = _holdings(model)
    return list(holdings)


def _holdings(model: nn.Module) -> tuple[dict[nn.Module, list[tuple[str, Any]]], list[nn.Module]]:
    """For each of those modules what it holds beside parameters, buffers and modules and may change in place; and
    which of them are unseen."""
    found: dict[nn.Module, list[tuple[str, Any]]] = {module: [] for module in model.modules()}
    waiting, seen = list(found), len(found)
    for module in waiting:
        entries = module.__dict__
        found[module] = held = [(k, entries[k]) for k in entries.keys() - _ITS_OWN if type(entries[k]) in _HELD]
        for value in (v for _, v in held if type(v) in _LISTS):
            hidden = dict.fromkeys(m for m in _modules_in(value) if m not in found)
            found.update({m: [] for m in hidden})
            waiting += hidden
    return found, waiting[seen:]


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif type(value) in _LISTS and len(value) <= _LONGEST:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(entry)


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Whatever a forward pass inside sets or changes in place on the modules (caches, counters, lists, buffers anew) is
    undone on exit. Not in plain tensors beyond a mebibyte, of which a warning tells, nor in objects of other kinds."""
    holdings, hidden = _holdings(model)
    saved = [
        (module, dict(module.__dict__), dict(module._parameters), dict(module._buffers), dict(module._modules))
        for module in holdings
    ]
    copies: dict[int, Any] = {}
    large: list[tuple[str, Tensor, int]] = []
    for module, held in holdings.items():
        for name, value in held:
            module.__dict__[name] = _working_copy(value, copies)
            if type(value) is Tensor and module.__dict__[name] is value and not value.requires_grad:
                large.append((f"{type(module).__name__}.{name}", value, version_of(value)))
    for module in hidden:
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, attributes, *stores in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            own: list[Any] = [module._parameters, module._buffers, module._modules]
            for store, entries in zip(own, stores, strict=True):
                store.clear()
                store.update(entries)
        for name, tensor, version in large:
            if version_of(tensor) != version:
                warnings.warn(
                    f"an evaluation has changed {name}, a plain tensor of {bytes_of(tensor) / 2**20:.1f} MiB that "
                    "forward writes, and cannot undo it: register it as a buffer",
                    RuntimeWarning,
                    stacklevel=2,
                )


@contextmanager
def left_alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules write into copies of their buffers, and what they set or change otherwise is undone on exit."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(preserved_attributes(module))
            stack.enter_context(substituted(module, {n: b.clone() for n, b in module.named_buffers()}))
        yield


def _working_copy(value: Any, copies: dict[int, Any]) -> Any:
    """A copy that may be changed in place, with what it holds; one of each object. Other things as they are."""
    kind = type(value)
    if kind not in _HELD:
        return value
    if id(value) not in copies:
        if kind is Tensor:
            copies[id(value)] = value if value.requires_grad or bytes_of(value) > _LARGEST else value.clone()
        elif kind is np.ndarray:
            copies[id(value)] = value if value.nbytes > _LARGEST else value.copy()
        elif kind is tuple and len(value) <= _LONGEST:
            copies[id(value)] = tuple(_working_copy(entry, copies) for entry in value)
        else:
            copies[id(value)] = copied = copy.copy(value)
            if kind in _LISTS and kind is not tuple and len(value) <= _LONGEST:
                for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    copied[key] = _working_copy(entry, copies)
    return copies[id(value)]


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; 0 where torch does not count, in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors of which a tensor consists: itself, or the indices and values of a sparse one."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor, dense or sparse."""
    return sum(part.nbytes for part in dense_parts(tensor))


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode, whose tensors autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor


def without_graph(compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, evaluated without a graph; with one, cut off after, if it takes derivatives itself.

    Those are models whose outputs are derivatives (forces, differential equations), by ``torch.autograd.grad``.
    """
    try:
        with torch.no_grad():
            return compute()
    except (RuntimeError, ValueError) as error:
        if "require grad" not in str(error):
            raise
    with torch.enable_grad():
        return map_tensors(Tensor.detach, compute())


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Inside, whatever surrounds it: tensors compute in their own types, float32 with all its digits (no autocast, no
    TF32), and a CPU takes denormal numbers for zero."""
    with torch.autocast(device.type, enabled=False), full_float32(device), flushed_on(device):
        yield


def in_own_arithmetic(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, whose first argument has a ``device``, computes in :func:`own_arithmetic`."""

    @wraps(f)
    def plain(first: Any, *args: Any, **kwargs: Any) -> Any:
        with own_arithmetic(torch.device(first.device)):
            return f(first, *args, **kwargs)

    return plain


NO_SECOND_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?_?(\w+?)_backward'? is not implemented")
"""torch's words where a product needs one that it has not, with the name of the operation."""


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    r""":math:`J^\top u = \nabla_x \sum_i \langle y_i(x), u_i \rangle` for outputs y that have a graph to the inputs x.

    ``batched``: m cotangents at once, stacked in front of each u. The options are those of ``torch.autograd.grad``.
    That takes cotangents as ``grad_outputs`` too, but imports sympy to compare shapes at its first use: half a second
    of every process that multiplies with a Hessian. The result is the same, bit for bit, and may share memory with u
    where J is the identity.
    """
    # a view of such pairs as complex numbers must begin at an even place
    cotangents = [u.clone() if u.ndim and u.shape[-1] == 2 and u.storage_offset() % 2 else u for u in cotangents]
    try:
        if batched:
            return torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, **options)
        with torch.enable_grad():
            inner = _InnerProduct.apply(len(outputs), *outputs, *cotangents)
        return torch.autograd.grad(inner, inputs, **options)
    except RuntimeError as error:
        missing = NO_SECOND_DERIVATIVE.search(str(error))
        if missing is None:
            raise
        raise RuntimeError(
            f"torch has no second derivative of {missing[1]}, which the model or the loss uses (the derivative of "
            f"{missing[1]}_backward is not implemented): put other operations in its place, or take "
            "objective.hessian_by_differences()"
        ) from error


class _InnerProduct(torch.autograd.Function):
    """A scalar whose derivative in each output is its cotangent, as it stands: nothing is multiplied or copied."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cotangents = ctx.saved_tensors
        return (None, *cotangents, *[None] * len(cotangents))


def require_second_derivatives(
    gradient: Sequence[Tensor | None], instead: str = "; take objective.hessian_by_differences()"
) -> None:
    """torch's own error for ``once_differentiable`` hangs beside the way to the parameters: it would take for constant
    what it cannot differentiate, without a word. ``instead`` ends the message."""
    waiting = [g.grad_fn for g in gradient if g is not None and g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                f"the model or the loss has a function without second derivative (once_differentiable){instead}"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def map_tensors(f: Callable[[Tensor], Any], value: Any) -> Any:
    """``f`` of each tensor of a value that may nest tuples, lists and mappings; other things as they are."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(f, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple_like(value, (map_tensors(f, v) for v in value))
    return value


def tuple_like(value: Sequence[Any], entries: Iterable[Any]) -> tuple[Any, ...]:
    """The entries as a tuple, with the names that a named tuple ``value`` gives them."""
    make: Callable[[Iterable[Any]], tuple[Any, ...]] = getattr(value, "_make", tuple)
    return make(entries)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a value that may nest tuples, lists and mappings, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def batch_size(value: Any) -> int:
    """Number of examples: the first dimension of the first tensor that has one, among inputs or targets.

    Raises
    ------
    ValueError
        If there is no such tensor.
    """
    for tensor in tensors_in(value):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError("a batch holds no tensor with a first dimension, so its number of examples is unknown")


def batch_flags(value: Any, size: int, batched: Batched = None) -> tuple[bool, ...]:
    """Which tensors of inputs (or targets) have ``size`` examples along their first dimension, in order.

    Those in the entries that ``batched`` names by position or key; without it, those whose first dimension is ``size``
    and that are not sparse (a sparse one has a row an example where it joins examples: a graph).

    Raises
    ------
    ValueError
        If there is no such entry, or it is not ``size`` long, or no tensor.
    """
    if batched is None:
        return tuple(t.layout is torch.strided and t.ndim > 0 and t.shape[0] == size for t in tensors_in(value))
    entries = dict(value) if isinstance(value, Mapping) else dict(enumerate(value if _is_sequence(value) else [value]))
    unknown = [key for key in batched if key not in entries]
    if unknown:
        raise ValueError(f"batched names {unknown[0]!r}, but the inputs are {list(entries)}")
    flags: list[bool] = []
    for key, entry in entries.items():
        if key in batched and has_uncut_examples(entry, size):
            raise ValueError(f"batched names {key!r}, which holds what is no tensor: only tensors are cut, make it one")
        for t in tensors_in(entry):
            if key in batched and (t.ndim == 0 or t.shape[0] != size):
                raise ValueError(f"batched names {key!r} of shape {tuple(t.shape)}, but there are {size} targets")
            flags.append(key in batched)
    return tuple(flags)


def take(value: Any, index: Tensor | slice, flags: Sequence[bool]) -> Any:
    """The examples ``index`` of inputs or targets: tensors with a flag are cut, the others (masks, scalars) stay."""
    remaining = iter(flags)

    def one(t: Tensor) -> Tensor:
        if not next(remaining):
            return t
        return t[index.to(t.device) if isinstance(index, Tensor) else index]

    return map_tensors(one, value)


def has_uncut_examples(value: Any, size: int) -> bool:
    """Whether inputs hold something of each of ``size`` examples that is no tensor (a list of lengths, an array), which
    :func:`take` leaves whole."""
    if isinstance(value, Tensor | str | bytes) or getattr(value, "ndim", 1) == 0:
        return False
    if isinstance(value, Sized) and len(value) == size and not tensors_in(value):
        return True
    entries = value.values() if isinstance(value, Mapping) else value if _is_sequence(value) else ()
    return any(has_uncut_examples(entry, size) for entry in entries)


def select(value: Any, index: Tensor | slice, *, size: int | None = None, batched: Batched = None) -> Any:
    """The examples ``index`` of inputs (or targets) of ``size`` examples, by default that of the first tensor."""
    return take(value, index, batch_flags(value, batch_size(value) if size is None else size, batched))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever forward passes inside do to the buffers (running statistics), they leave as they were."""
    saved = [
        (module._buffers, name, b, b.detach().clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for store, name, buffer, value in saved:
                store[name] = buffer
                buffer.copy_(value)
