r"""A module as a deterministic pure function :math:`z = \phi(\theta, x)` under an explicit policy.

Curvature is a property of a function. A module becomes one when it is said how its batch normalisation behaves
(``batch_norm``), when dropout is off or replays fixed draws, and when running statistics are read but never written.
An evaluation changes nothing of the module: parameters, buffers, attributes, modes, generators.
"""

from __future__ import annotations

import copy
import fnmatch
import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from curvspace.arithmetic import full_float32, require_float64
from curvspace.curvature.as_written import as_written, plain_kernels, without_cached_weights
from curvspace.differentiation import require_second_derivatives
from curvspace.functional import trainable_parameters, unwrapped
from curvspace.inputs import Inputs, call, map_tensors
from curvspace.module_state import alike, modules_within, preserved_attributes, substituted
from curvspace.seeds import replayed_randomness
from curvspace.tensors import ordinary
from curvspace.threads import ALONE

BatchNorm = Literal["batch", "running"] | None
"""Whose statistics batch normalisation takes: the batch's, the stored ones, or as the module's present mode says."""


class FrozenModel:
    r"""The pure function :math:`\phi(\theta, x)` of a module.

    Parameters
    ----------
    model
        Any ``nn.Module``. Parameters with ``requires_grad=False`` and buffers are constants. Of a compiled or
        data-parallel one the module inside is taken.
    batch_norm
        How normalisation layers with running statistics behave: ``"batch"`` uses the statistics of the batch,
        ``"running"`` the stored ones, ``None`` whatever the module's present mode says. Never written. Those are
        torch's layers, what derives from them, and modules with a buffer ``running_mean``; any other module is in
        evaluation mode where dropout is off.
    dropout_seed
        ``None`` turns dropout off. An integer leaves it on with the same masks for every evaluation of a batch.
    dtype
        Evaluate in this floating type instead of the parameters' own (the widest of them).
    parameters
        Names or patterns (``"head.*"``) of the parameters that are coordinates, the others being constants;
        ``None``: all that are trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_norm: BatchNorm = None,
        dropout_seed: int | None = None,
        dtype: torch.dtype | None = None,
        parameters: str | Sequence[str] | None = None,
    ):
        if batch_norm not in ("batch", "running", None):
            raise ValueError(
                f'batch_norm must be "batch", "running" or None (the module\'s present mode), got {batch_norm!r}'
            )
        self.model = model = unwrapped(model)
        _refuse_scripted(model)
        found = trainable_parameters(model)
        self.names = _chosen(list(found), parameters)
        self._all = parameters is None
        self.dtype = dtype or _widest(found.values())
        self.device = _only_device(found)
        self.dropout_seed = dropout_seed
        self._batch_norm = batch_norm
        self._flags: dict[nn.Module, bool] = {}
        self.modes  # noqa: B018  where it is the module's present mode, of the time of the construction
        self._twice = False
        self.backward_is_linear = False  # until a product has shown it

    @property
    def _modes(self) -> list[tuple[nn.Module, bool]]:
        """The modules and their training flags under the policy; of those that the model has got meanwhile, too."""
        modules = modules_within(self.model)
        for module in modules:
            if module not in self._flags:
                self._flags[module] = self._training_flag(module)
        return [(m, self._flags[m]) for m in modules]

    def _training_flag(self, module: nn.Module) -> bool:
        if _is_normalisation(module):
            return module.training if self._batch_norm is None else self._batch_norm == "batch"
        return self.dropout_seed is not None

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a normalisation mixes the examples of a batch."""
        return any(_normalises_by_batch(m, mode) for m, mode in self._modes)

    @property
    def keeps_modes(self) -> bool:
        """Whether normalisation acts as it does in the module's present mode."""
        norms = [(m, mode) for m, mode in self._modes if _is_normalisation(m) and m.running_mean is not None]
        return all(m.training == mode for m, mode in norms)

    @property
    def examples_interact(self) -> bool:
        """Whether it is known that outputs depend on which examples share a batch (batch statistics, shared draws)."""
        return self.uses_batch_statistics or self.dropout_seed is not None

    @property
    def size(self) -> int:
        """P, the number of coordinates."""
        return sum(p.numel() for p in self._chosen_ones())

    @property
    def modes(self) -> tuple[bool, ...]:
        """The training flags under the policy, module by module."""
        return tuple(mode for _, mode in self._modes)

    @property
    def policy(self) -> dict[str, str]:
        """The policy, in words for an output table."""
        own = any(mode and _is_normalisation(m) and not isinstance(m, _NormBase) for m, mode in self._modes)
        return {
            "batch_norm": "batch" if self.uses_batch_statistics or own else "running",
            "dropout": "off" if self.dropout_seed is None else f"seed {self.dropout_seed}",
        }

    def restricted(self, parameters: str | Sequence[str]) -> FrozenModel:
        """The same function of some of its parameters, the others being constants."""
        other = copy.copy(self)
        other.names, other._all = _chosen(self.names, parameters), False
        return other

    def in_dtype(self, dtype: torch.dtype) -> FrozenModel:
        """The same function in another floating type."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def originals(self) -> tuple[Tensor, ...]:
        """The model's own trainable parameters, which no evaluation may depend on."""
        return tuple(trainable_parameters(self.model).values())

    def parameters(self) -> tuple[Tensor, ...]:
        """Copies of the chosen parameters as fresh leaves that require gradients."""
        chosen = self._chosen_ones()
        with torch.inference_mode(False):
            copies = (alike(p.detach().to(self.device, self.dtype, copy=True), p) for p in chosen)
            return tuple(p.requires_grad_() for p in copies)

    def _chosen_ones(self) -> list[Tensor]:
        found = trainable_parameters(self.model)
        gone = [name for name in self.names if name not in found]
        new = [name for name in found if name not in self.names] if self._all else []
        if gone or new:
            names = ", ".join(map(repr, (gone or new)[:4])) + ", …" * (len(gone or new) > 4)
            raise RuntimeError(
                f"the trainable parameters of {type(self.model).__name__} have changed: {names} is "
                f"{'frozen or gone' if gone else 'new'} since this objective or operator was made: make a new one"
            )
        return [found[name] for name in self.names]

    def constants(self) -> dict[str, Tensor]:
        """Copies of everything else that the model holds: buffers and the other parameters."""
        chosen = set(self.names)
        others = {n: p.detach() for n, p in self.model.named_parameters() if n not in chosen}
        with torch.inference_mode(False):
            return {n: self.cast(t).clone() for n, t in {**others, **dict(self.model.named_buffers())}.items()}

    def cast(self, value: Any) -> Any:
        """Tensors (also inside tuples and mappings) on the model's device, floating and complex ones in its type."""

        def move(t: Tensor) -> Tensor:
            dtype = self.dtype if t.is_floating_point() else t.dtype
            if t.is_complex():
                dtype = torch.promote_types(self.dtype, torch.float32).to_complex()
            return ordinary(t.to(self.device, dtype))

        return map_tensors(move, value)

    def __call__(
        self, parameters: Sequence[Tensor], constants: Mapping[str, Tensor], inputs: Inputs, index: int = 0
    ) -> Any:
        """The outputs at these parameters; ``index`` numbers the batch, so that each has its own dropout masks."""
        with self.policy_in_force():
            return self.evaluate(parameters, constants, inputs, index)

    def evaluate(
        self, parameters: Sequence[Tensor], constants: Mapping[str, Tensor], inputs: Inputs, index: int = 0
    ) -> Any:
        """The same inside :meth:`policy_in_force`, for many small calls in a row."""
        with self.at(parameters, constants, index):
            return self.outputs(inputs)

    @contextmanager
    def at(self, parameters: Sequence[Tensor], constants: Mapping[str, Tensor], index: int = 0) -> Iterator[None]:
        """The model at these parameters, for whoever calls it or reads it inside; afterwards as it was."""
        with ALONE, ExitStack() as stack:
            buffers = {name for name, _ in self.model.named_buffers()}  # layers may write them: into copies
            own = {n: t.clone() if n in buffers else t for n, t in constants.items()}
            tensors = {**own, **dict(zip(self.names, parameters, strict=True))}
            if self.dropout_seed is not None:
                stack.enter_context(replayed_randomness(self.device, self.dropout_seed + index))
            stack.enter_context(preserved_attributes(self.model))
            stack.enter_context(substituted(self.model, tensors))
            yield

    def outputs(self, inputs: Inputs) -> Any:
        """The module's outputs inside :meth:`at`."""
        return call(self.model, inputs)

    def gradient(
        self, value: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False
    ) -> list[Tensor | None]:
        """The derivative in each parameter of a scalar made from outputs; None where there is none. Keeps the graph.

        Raises
        ------
        ValueError
            If it depends on none of the parameters, or on the model's own ones, which the function cannot replace.
        RuntimeError
            With ``create_graph``, if it has no second derivative because a function is ``once_differentiable``.
        """
        name, originals = type(self.model).__name__, self.originals()
        if not value.requires_grad:
            reason = "held outside of the modules, or cut off by detach or no_grad"
            raise ValueError(f"what is computed from {name} depends on none of its trainable parameters ({reason}?)")
        found = torch.autograd.grad(
            value, [*parameters, *originals], create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        own = [p for p, g in zip(originals, found[len(parameters) :], strict=True) if g is not None]
        if own:
            found_names = [n for n, p in self.model.named_parameters() if any(p is q for q in own)]
            names = ", ".join(found_names[:4]) + ", …" * (len(found_names) > 4)
            raise ValueError(
                f"{name}, its loss or its inputs use {names} by references kept outside of the modules (a list, a "
                "closure, inputs computed with them), where they cannot be replaced: read them as attributes of their "
                "modules each time, or detach them"
            )
        if create_graph and not self._twice:
            require_second_derivatives(found)
            self._twice = True
        return list(found[: len(parameters)])

    @contextmanager
    def policy_in_force(self) -> Iterator[None]:
        """Train/eval flags by the policy, layers by kernels that have all derivatives; restored on exit.

        Checkpointing and compilation are off: both would come back to the module when it is itself again. So are
        autocast and TF32: the precision is ``dtype``'s.
        """
        with ALONE, ExitStack() as stack:
            modes = self._modes
            changed = [(m, mode) for m, mode in modes if m.training != mode]
            sparse = [m for m, _ in modes if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
            if self.dropout_seed is None:  # whatever the model draws, it leaves no trace
                stack.enter_context(replayed_randomness(self.device))
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.device.type == "cuda":
                stack.enter_context(full_float32(self.device))
            stack.enter_context(as_written())
            stack.enter_context(without_cached_weights())
            stack.enter_context(plain_kernels(m for m, _ in modes))
            try:
                for module, mode in changed:
                    module.training = mode
                for embedding in sparse:  # gradients of theirs have no second derivative
                    embedding.sparse = False
                yield
            finally:
                for module, mode in changed:
                    module.training = not mode
                for embedding in sparse:
                    embedding.sparse = True


def _refuse_scripted(model: nn.Module) -> None:
    """Their parameters cannot be replaced from outside, and what the compiler makes lacks second derivatives."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its module {name!r}" if name else "it"
            raise TypeError(
                f"{type(model).__name__}: {what} was compiled by torch.jit.script or torch.jit.trace, "
                "which curvature cannot be computed of: give the module as it was before that, with the same weights"
            )


def _chosen(names: list[str], patterns: str | Sequence[str] | None) -> list[str]:
    if patterns is None:
        return names
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no trainable parameter is named {pattern!r}; there are {', '.join(names[:8])}, …")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def untied(function: FrozenModel, patterns: str | Sequence[str]) -> list[str]:
    """The patterns, and for a tied parameter's second name (``"head.weight"``) its first (``"embed.weight"``)."""
    first = {id(p): name for name, p in function.model.named_parameters()}
    names = [(name, first[id(p)]) for name, p in function.model.named_parameters(remove_duplicate=False)]
    others = [(name, own) for name, own in names if name != own and own in function.names]
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        tied = [glob.escape(own) for name, own in others if fnmatch.fnmatchcase(name, pattern)]
        found += tied if tied and not fnmatch.filter(function.names, pattern) else [*tied, pattern]
    return found


def _widest(parameters: Any) -> torch.dtype:
    widest: torch.dtype | None = None
    for p in parameters:
        widest = p.dtype if widest is None else torch.promote_types(widest, p.dtype)
    assert widest is not None
    return widest


def _only_device(parameters: Mapping[str, Tensor]) -> torch.device:
    devices = {p.device: name for name, p in parameters.items()}
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"the model's parameters lie on several devices ({where}); put them on one")
    device = next(iter(devices))
    require_float64(device)
    return device


def _is_normalisation(module: nn.Module) -> bool:
    """Whether a layer has statistics to choose from: torch's, or one of the user's with a buffer of torch's name."""
    return isinstance(module, _NormBase) or "running_mean" in module._buffers


def _normalises_by_batch(module: nn.Module, training: bool) -> bool:
    """Whether a layer mixes examples: batch normalisation in training mode or without stored statistics."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return training or module.running_mean is None
