"""What all optimisers of this package share: the model, the loss, honest costs, one flat extra state."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.arithmetic import require_float64
from curvspace.curvature.as_written import as_written, without_checkpointing
from curvspace.denormals import flushed_on
from curvspace.differentiation import without_graph
from curvspace.functional import trainable_parameters
from curvspace.inputs import Inputs
from curvspace.loss_state import require_no_reference
from curvspace.losses import Loss, get_loss
from curvspace.optim.ranks import Ranks


@dataclass
class Costs:
    """What an optimiser has spent so far, in passes over one minibatch (a pass over half of it counts 0.5).

    ``products`` counts curvature products; the forward-mode and reverse-mode passes that they consist of are
    counted in ``jvp`` and ``backward`` too. ``seconds`` is wall-clock inside ``step``, which waits for its own work:
    on a GPU it would measure the queueing otherwise.
    """

    forward: float = 0.0
    backward: float = 0.0
    jvp: float = 0.0
    products: float = 0.0
    seconds: float = 0.0

    @property
    def gradient_evaluations(self) -> float:
        """Gradient-equivalents: a gradient is one forward and one backward pass, these two and a
        forward-mode pass weighing 1 : 2 : 2 (arithmetic of a linear layer)."""
        return (self.forward + 2 * self.backward + 2 * self.jvp) / 3

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "gradient_evaluations": self.gradient_evaluations}


class ModelOptimizer(torch.optim.Optimizer):
    """An optimiser that evaluates the model itself: ``loss = opt.step(inputs, targets)``.

    Of a ``DistributedDataParallel`` model it evaluates the module inside and takes itself the mean over the examples
    of all processes, whose shards may differ in size: replicas stay equal bit for bit. A copy (``copy.deepcopy``,
    ``pickle``) has a copy of the model and goes on as the original would.

    Subclasses implement ``_step(inputs, targets) -> loss before the step`` and, if they keep state outside
    ``self.state``, ``_extra_state() -> dict`` and ``_load_extra_state(dict)``.
    """

    couples_parameters = True
    """Whether a step is one function of all parameters, which must then be real numbers of one type on one device."""
    distributed = True
    """Whether a step can be shared between processes."""

    def __init__(
        self, model: nn.Module, defaults: dict[str, Any], loss: str | Loss | Callable[[Tensor, Tensor], Tensor]
    ):
        self.model, self.ranks = Ranks.of(model)
        parameters: dict[str, Any] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.couples_parameters:
            parameters = trainable_parameters(self.model)
            _require_alike(type(self).__name__, parameters)
        if not self.ranks.alone:
            self._require_shareable()
        super().__init__(list(parameters.values()), defaults)
        self._trainable = list(parameters.values())
        self.loss = get_loss(loss)
        self.costs = Costs()
        self.evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.steps = 0
        """Steps taken; inside ``_step``, those before it."""
        self._stepped_on: tuple[torch.dtype, torch.device] | None = None
        self.grad_norm: Tensor | None = None
        """|g| of the last minibatch, a scalar on the device; None where the gradient is never formed alone."""

    def step(self, inputs: Inputs, targets: Tensor) -> Tensor:  # type: ignore[override]
        """One step on a minibatch; returns its mean loss before the step (a detached scalar)."""
        start = time.perf_counter()
        self._require_same_parameters()
        with flushed_on(self._trainable[0].device), self._as_written(), _fresh_autocast(), self._full_precision():
            loss = self._step(inputs, targets)
        self.ranks.equalise_buffers(self.model)
        self.steps += 1
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        self.costs.seconds += time.perf_counter() - start
        return loss.detach()

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _as_written(self) -> AbstractContextManager[None]:
        """Compiled and checkpointed parts of the model run as written where a step takes more than ``backward``."""
        if self.couples_parameters:
            return as_written()
        return nullcontext() if self.ranks.alone else without_checkpointing()

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Only what is inside ``with self.evaluating()`` follows an autocast around the step: the model's passes."""
        kind = self._trainable[0].device.type
        if not (self.couples_parameters and torch.is_autocast_enabled(kind)):
            yield
            return
        self.evaluating = partial(torch.autocast, kind, torch.get_autocast_dtype(kind))
        try:
            with torch.autocast(kind, enabled=False):
                yield
        finally:
            self.evaluating = nullcontext

    def _require_same_parameters(self) -> None:
        """A step is for the parameters that were trainable when the optimiser was made."""
        held = {id(p) for p in self._trainable}
        if not self.couples_parameters:
            held |= {id(p) for group in self.param_groups for p in group["params"]}
        present = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        new = [name for name, p in present.items() if id(p) not in held]
        lost = len(held) - (len(present) - len(new)) if self.couples_parameters else 0
        if new or lost:
            what = f"{new[0]!r} is new" if new else f"{lost} of them are frozen or gone"
            raise ValueError(
                f"the trainable parameters of {type(self.model).__name__} have changed since this "
                f"{type(self).__name__} was made ({what}): make a new optimiser"
            )
        kind = (self._trainable[0].dtype, self._trainable[0].device)
        if self.couples_parameters and self._stepped_on not in (None, kind):
            raise ValueError(
                f"the parameters of {type(self.model).__name__} are {kind[0]} on {kind[1]} now, but this "
                f"{type(self).__name__} has taken steps on {' on '.join(map(str, self._stepped_on or ()))}: "
                "make a new optimiser"
            )
        self._stepped_on = kind

    def _move_loss(self, outputs: Any, targets: Any) -> None:
        """What the loss keeps of the minibatches moves once a step, by the outputs before it: for steps that evaluate
        it more often, each time as it was."""
        if self.loss.stateful:
            with self.evaluating():
                without_graph(lambda: self.loss(outputs, targets))

    def _modules(self) -> list[tuple[nn.Module, bool]]:
        """The model's modules and their modes: where they are as they were, what was checked of them holds."""
        return [(m, m.training) for m in self.model.modules()]

    def _require_shareable(self) -> None:
        name = type(self).__name__
        if not self.distributed:
            raise ValueError(f"{name} works within one process; pass the module inside DistributedDataParallel")
        if self.couples_parameters and any(isinstance(m, nn.SyncBatchNorm) for m in self.model.modules()):
            raise ValueError(f"{name} cannot differentiate SyncBatchNorm as it needs; use BatchNorm")

    def __getstate__(self) -> dict[str, Any]:
        if not self.ranks.alone:
            raise TypeError(f"{type(self).__name__} of a distributed model cannot be copied; use its state_dict()")
        require_no_reference(self.loss, self.model, type(self).__name__)
        # A scheduler puts a step of its own on the object, bound to it; torch makes hooks anew.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError(f"{type(self).__name__} takes one param group: its step couples all parameters")
        super().add_param_group(param_group)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the model has the parameters that are to be judged: for most optimisers the present ones."""
        yield

    def log(self) -> dict[str, float]:
        """Scalars worth a column of ``metrics.csv`` after each step (damping, ratio, ...)."""
        return {}

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """All that a fresh optimiser needs to go on bit for bit, as a copy: later steps change nothing of it."""
        own = {"steps": self.steps, "costs": asdict(self.costs), "extra": self._extra_state()}
        return {**copy.deepcopy(super().state_dict()), **own, "made_of": self._made_of()}

    def _made_of(self) -> dict[str, Any]:
        """What a state must fit, by name."""
        shapes = [list(p.shape) for p in self._trainable]
        return {"optimiser": type(self).__name__, **({"parameters": shapes} if self.couples_parameters else {})}

    def _require_own(self, state_dict: Mapping[str, Any]) -> None:
        """A state dict is of an optimiser like this one (older ones do not say of which)."""
        name = type(self).__name__
        if missing := {"state", "param_groups", "steps", "costs", "extra"} - set(state_dict):
            raise ValueError(
                f"this is no state dict of a {name}: it lacks {sorted(missing)[0]!r} (one of torch's own optimiser is "
                "loaded into that optimiser, also where it is wrapped)"
            )
        present = self._made_of()
        for key, value in state_dict.get("made_of", present).items():
            if value != present.get(key):
                raise ValueError(
                    f"this state dict is of another optimiser: its {key} = {value!r}, here {present.get(key)!r}; "
                    f"make the {name} as it was when the state was saved"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._require_own(state_dict)
        super().load_state_dict(copy.deepcopy({k: state_dict[k] for k in ("state", "param_groups")}))
        self.steps, self.costs = state_dict["steps"], Costs(**state_dict["costs"])
        self._load_extra_state(state_dict["extra"])
        self._stepped_on = None


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise the ``ValueError`` that a bad hyper-parameter deserves."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def require_count(name: str, value: object, least: int = 1, optional: bool = False) -> None:
    """Raise ``ValueError`` for what is no integer, or below ``least``; ``optional`` lets None pass."""
    if optional and value is None:
        return
    require(isinstance(value, Integral) and not isinstance(value, bool), name, value, "an integer")
    require(value >= least, name, value, f"at least {least}")  # type: ignore[operator]


def require_numbers(**values: object) -> None:
    """Raise ``ValueError`` for what is no real number, as text is (a tensor of one number is one)."""
    for name, value in values.items():
        number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
        require(number, name, value, "a number")


def require_flag(name: str, value: object) -> None:
    """Raise ``ValueError`` for what is neither True nor False: any other value would count as True without a word."""
    require(isinstance(value, bool), name, value, "True or False")


def _require_alike(name: str, parameters: Mapping[str, Tensor]) -> None:
    """One real floating type of at least 32 bits, one device."""
    first_name, first = next(iter(parameters.items()))
    require_float64(first.device)
    for key, p in parameters.items():
        if not p.is_floating_point() or torch.finfo(p.dtype).bits < 32:
            raise ValueError(
                f"{name} needs parameters in float32 or float64, but {key!r} is {p.dtype}"
                + ("" if p.is_complex() else ": keep them in float32 and put torch.autocast around the step")
            )
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} needs parameters of one type on one device, but {first_name!r} is {first.dtype} on "
                f"{first.device} and {key!r} {p.dtype} on {p.device}"
            )


@contextmanager
def _fresh_autocast() -> Iterator[None]:
    """Autocast keeps casts of parameters until its context ends, also when a step has changed the parameters."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def copied(value: Any, device: torch.device | None = None) -> Any:
    """Nested dictionaries with their tensors copied: a state dict does not change under later steps."""
    if isinstance(value, Tensor):
        return value.to(device or value.device, copy=True)
    if isinstance(value, Mapping):
        return {k: copied(v, device) for k, v in value.items()}
    return value
