r"""A module as a deterministic pure function :math:`z = \phi(\theta, x)` under an explicit state policy.

Curvature is a property of a function. A module becomes one when it is said how its batch normalisation behaves
(``state``), when dropout is off or replays fixed draws, and when running statistics are read but never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from curvspace.functional import Inputs, call_with, replayed_randomness, trainable_parameters

State = Literal["batch", "running"] | None


class FrozenModel:
    r"""The pure function :math:`\phi(\theta, x)` of a module.

    Parameters
    ----------
    model
        Any ``nn.Module``. Parameters with ``requires_grad=False`` and buffers are constants.
    state
        How normalisation layers with running statistics behave: ``"batch"`` uses the statistics of the batch,
        ``"running"`` the stored ones, ``None`` whatever the module's present mode says. Never written.
    dropout_seed
        ``None`` turns dropout off. An integer leaves it on with the same masks for every evaluation of a batch.
    dtype
        Evaluate in this floating type instead of the parameters' own.
    """

    def __init__(
        self, model: nn.Module, state: State = None, dropout_seed: int | None = None, dtype: torch.dtype | None = None
    ):
        if state not in ("batch", "running", None):
            raise ValueError(f'state must be "batch", "running" or None (the module\'s present mode), got {state!r}')
        parameters = trainable_parameters(model)
        first = next(iter(parameters.values()))
        self.model = model
        self.names = list(parameters)
        self.dtype = dtype or first.dtype
        self.device = first.device
        self.dropout_seed = dropout_seed
        self._modes = [(m, self._training_flag(m, state, dropout_seed is not None)) for m in model.modules()]
        self.uses_batch_statistics = any(_normalises_by_batch(m, mode) for m, mode in self._modes)

    @staticmethod
    def _training_flag(module: nn.Module, state: State, dropout: bool) -> bool:
        if isinstance(module, _NormBase):
            return module.training if state is None else state == "batch"
        return dropout

    @property
    def keeps_modes(self) -> bool:
        """Whether normalisation acts as it does in the module's present mode."""
        norms = [(m, mode) for m, mode in self._modes if isinstance(m, _NormBase) and m.running_mean is not None]
        return all(m.training == mode for m, mode in norms)

    @property
    def examples_interact(self) -> bool:
        """Whether an example's output depends on which others are in its batch (batch statistics, shared draws)."""
        return self.uses_batch_statistics or self.dropout_seed is not None

    @property
    def policy(self) -> dict[str, str]:
        """The state policy, in words for an output table."""
        return {
            "normalisation": "batch" if self.uses_batch_statistics else "running",
            "dropout": "off" if self.dropout_seed is None else f"seed {self.dropout_seed}",
        }

    def parameters(self) -> tuple[Tensor, ...]:
        """Copies of the trainable parameters as fresh leaves that require gradients."""
        found = trainable_parameters(self.model)
        return tuple(p.detach().to(self.dtype, copy=True).requires_grad_() for p in found.values())

    def constants(self) -> dict[str, Tensor]:
        """Copies of everything else that the model holds: buffers and frozen parameters."""
        frozen = {n: p.detach() for n, p in self.model.named_parameters() if not p.requires_grad}
        return {n: self.cast(t).clone() for n, t in {**frozen, **dict(self.model.named_buffers())}.items()}

    def cast(self, value: Any) -> Any:
        """Tensors (also inside tuples and mappings) on the model's device, floating ones in its type."""
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Mapping):
            return {k: self.cast(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return tuple(self.cast(v) for v in value)
        return value

    def __call__(
        self, parameters: Sequence[Tensor], constants: Mapping[str, Tensor], inputs: Inputs, index: int = 0
    ) -> Tensor:
        """The outputs at these parameters; ``index`` numbers the batch, so that each has its own dropout masks."""
        with self.policy_in_force():
            return self.evaluate(parameters, constants, inputs, index)

    def evaluate(
        self, parameters: Sequence[Tensor], constants: Mapping[str, Tensor], inputs: Inputs, index: int = 0
    ) -> Tensor:
        """The same inside :meth:`policy_in_force`, for many small calls in a row."""
        if self.uses_batch_statistics:  # the layers write their running statistics: into copies
            constants = {n: t.clone() for n, t in constants.items()}
        tensors = {**constants, **dict(zip(self.names, parameters, strict=True))}
        seed = self.dropout_seed
        draws = nullcontext() if seed is None else replayed_randomness(self.device, seed + index)
        with draws:
            return call_with(self.model, tensors, inputs)

    @contextmanager
    def policy_in_force(self) -> Iterator[None]:
        """Train/eval flags by the policy, attention by kernels that have all derivatives; restored on exit."""
        changed = [(m, mode) for m, mode in self._modes if m.training != mode]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            for module, mode in changed:
                module.training = mode
            torch.backends.mha.set_fastpath_enabled(False)
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, mode in changed:
                module.training = not mode


def _normalises_by_batch(module: nn.Module, training: bool) -> bool:
    """Whether a layer mixes examples: batch normalisation in training mode or without stored statistics."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return training or module.running_mean is None
