"""Any optimiser of torch with the interface of this package, so that one training loop serves all."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.errors import refuse_text
from curvspace.inputs import Inputs, call
from curvspace.losses import Loss
from curvspace.optim.base import ModelOptimizer, require
from curvspace.outputs import map_outputs
from curvspace.seeds import replayed_randomness

LossLike = str | Loss | Callable[[Tensor, Tensor], Tensor]


class FirstOrder(ModelOptimizer):
    """``FirstOrder(model, torch.optim.SGD, lr=0.1, momentum=0.9).step(x, y)``.

    The wrapped optimiser's param groups and state are this one's: schedulers and checkpoints act on either. It may hold
    a part of the model: gradients of other parameters are left as they are, and ``grad_norm`` is that of its own. One
    that steps with a closure (``LBFGS``) is given one that evaluates the same minibatch. One with a training and an
    evaluation mode (schedule-free ones) is in training mode; :meth:`evaluated` shows the weights of the other.

    Parameters
    ----------
    optimizer
        A class, called with the trainable parameters (or ``groups``) and ``options``; or a ready optimiser.
    groups
        Param groups of the model's trainable parameters, for classes that treat some of them differently.

    Raises
    ------
    ValueError
        For an option that the class does not name (one swallowed by its ``**kwargs`` would have no effect), and for a
        ready optimiser that holds no trainable parameter of the model.
    """

    couples_parameters = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        loss: LossLike = "cross_entropy",
        groups: list[dict[str, Any]] | None = None,
        **options: Any,
    ):
        if isinstance(optimizer, type):
            refuse_unknown(optimizer, options)
            parameters: Any = [p for p in model.parameters() if p.requires_grad]
            inner: Any = optimizer(groups or parameters, **options)
        else:
            inner = optimizer
        self.inner: Any = SimpleNamespace()  # takes the groups that the base class makes of the model's parameters
        super().__init__(model, inner.defaults, loss)
        self.inner = inner
        require(bool(self._moved()), "optimizer", type(inner).__name__, "one that holds parameters of the model")
        self._closure = _needs_closure(inner)
        self._first_outputs: Any = None
        self._moded = inner if callable(getattr(inner, "train", None)) else None
        if self._moded:
            self._moded.train()

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimiser's, also when it has been given others."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property  # type: ignore[override]
    def state(self) -> Any:
        """The wrapped optimiser's, as the param groups are."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    def __getstate__(self) -> dict[str, Any]:
        """Torch's optimisers leave out of a copy what they keep beside state and param groups (as ``LBFGS`` does)."""
        kept: dict[str, Any] = {}
        if type(self.inner).__getstate__ is torch.optim.Optimizer.__getstate__:
            left = ("step", "state", "param_groups", "defaults")
            kept = {k: v for k, v in vars(self.inner).items() if k not in left and not k.startswith("_optimizer_")}
        return {**super().__getstate__(), "_beside": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or (``load_state_dict``) param groups and state alone, which are the wrapped optimiser's."""
        super().__setstate__({k: v for k, v in state.items() if k not in ("state", "param_groups", "_beside")})
        if "inner" not in state:
            self.inner.__setstate__(state)
        vars(self.inner).update(state.get("_beside", {}))

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        if self._closure:
            return self._step_with_closure(inputs, targets)
        loss = self._gradient(inputs, targets)
        self._take()
        return loss

    def _step_with_closure(self, inputs: Inputs, targets: Tensor) -> Tensor:
        seen: list[tuple[Tensor, Tensor | None]] = []

        def closure() -> Tensor:
            torch.clear_autocast_cache()  # casts of weights that have moved since the last evaluation
            with torch.enable_grad(), self.loss.at_rest(set(self.model.modules())):
                seen.append((self._gradient(inputs, targets), self.grad_norm))
            return seen[-1][0]

        self._first_outputs = None
        self.inner.step(closure)
        loss, self.grad_norm = seen[0]
        with replayed_randomness(loss.device):
            self._move_loss(self._first_outputs, targets)
        self._first_outputs = None
        return loss

    def _gradient(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """The mean loss; its gradient is left in the ``grad`` of the parameters that the optimiser holds."""
        self.inner.zero_grad(set_to_none=True)
        own, others = self._parted()
        outputs = call(self.model, inputs)
        if self._closure and self._first_outputs is None:
            self._first_outputs = map_outputs(outputs, Tensor.detach)
        loss = self.loss(outputs, targets)
        if self.ranks.alone:
            with _gradients_kept(others):
                loss.backward()
        else:
            loss = self._shared_backward(loss, inputs, targets)
        gradients = [p.grad for p in own if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else [torch.zeros_like(loss)]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        self.costs.forward += 1
        self.costs.backward += 1
        return loss

    def _parted(self) -> tuple[list[Tensor], list[Tensor]]:
        """The model's parameters that the optimiser holds, and the others, in the model's order."""
        held = {id(p) for group in self.param_groups for p in group["params"]}
        own: list[Tensor] = []
        others: list[Tensor] = []
        for p in self.model.parameters():
            (own if id(p) in held else others).append(p)
        return own, others

    def _moved(self) -> list[Tensor]:
        """The model's trainable parameters that the optimiser moves, in the model's order."""
        return [p for p in self._parted()[0] if p.requires_grad]

    def _take(self) -> None:
        """The wrapped optimiser's own step, from the parameters' ``grad``."""
        self.inner.step()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, a schedule-free optimiser's model has its averaged weights; afterwards the others, bit for bit."""
        if not self._moded:
            yield
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        present = [p.detach().clone() for p in parameters]
        self._moded.eval()
        try:
            yield
        finally:
            self._moded.train()
            with torch.no_grad():
                torch._foreach_copy_(parameters, present)

    def _shared_backward(self, loss: Tensor, inputs: Inputs, targets: Any) -> Tensor:
        """The mean over all processes' examples of the gradient, in ``.grad``, and of the loss.

        A parameter that no process has used keeps None. Gradients are not accumulated by ``backward``, whose hooks
        are the data-parallel wrapper's.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        share = self.ranks.share(self.loss, inputs, targets, loss.device)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise ValueError("sparse gradients cannot be shared between processes; make the embedding dense")
        used = self.ranks.any([g is not None for g in gradients], loss.device)
        given = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        for p, mean, u in zip(parameters, self.ranks.mean(given, share), used, strict=True):
            p.grad = laid_out_as(p, mean) if u else None
        return self.ranks.mean([loss.detach()], share)[0]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(self.inner, torch.optim.Optimizer) and not self.couples_parameters:
            self.inner.add_param_group(param_group)
        else:  # also while the base class is set up
            super().add_param_group(param_group)

    def _made_of(self) -> dict[str, Any]:
        return {**super()._made_of(), "wrapped": type(self.inner).__name__}

    @property
    def _has_own_states(self) -> bool:
        """Whether the wrapped optimiser saves more than torch does, or loads it in a way of its own."""
        kind, torchs = type(self.inner), torch.optim.Optimizer
        return kind.state_dict is not torchs.state_dict or kind.load_state_dict is not torchs.load_state_dict

    def state_dict(self) -> dict[str, Any]:
        own = {"wrapped": copy.deepcopy(self.inner.state_dict())} if self._has_own_states else {}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "wrapped" in state_dict:
            self.inner.load_state_dict(copy.deepcopy(state_dict["wrapped"]))
        if type(self.inner).__module__.startswith("torch.optim"):
            self._count_on_the_host()
        if self._moded:
            self._moded.train()

    def _count_on_the_host(self) -> None:
        """Of a state that was read to the GPU whole, torch's optimisers would wait at each parameter's step number."""
        for group in self.param_groups:
            for p in [] if group.get("capturable") or group.get("fused") else group["params"]:
                state = self.state.get(p, {})
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].cpu()


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in its parameter's layout, as ``backward`` leaves it: fused optimisers read the two side by side."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


@contextmanager
def _gradients_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """What a backward pass inside adds to these parameters' ``grad`` is dropped afterwards."""
    present = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, g in zip(parameters, present, strict=True):
            p.grad = g


def refuse_unknown(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an option that the class's signature does not name, and for text as a flag or number."""
    parameters = inspect.signature(kind).parameters
    named = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if unknown := [name for name in options if name not in named]:
        raise ValueError(f"{kind.__name__} has no option {unknown[0]!r}; it has {', '.join(named[1:])}")
    refuse_text(kind.__name__, kind, options)


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def sgd(model: nn.Module, lr: float, loss: LossLike = "cross_entropy", **options: Any) -> FirstOrder:
    """Torch's SGD; ``options`` are its own."""
    return FirstOrder(model, torch.optim.SGD, loss, lr=lr, **options)


def adam(model: nn.Module, lr: float, loss: LossLike = "cross_entropy", **options: Any) -> FirstOrder:
    """Torch's Adam; ``options`` are its own."""
    return FirstOrder(model, torch.optim.Adam, loss, lr=lr, **options)


def rmsprop(model: nn.Module, lr: float, loss: LossLike = "cross_entropy", **options: Any) -> FirstOrder:
    """Torch's RMSprop; ``options`` are its own."""
    return FirstOrder(model, torch.optim.RMSprop, loss, lr=lr, **options)


def muon(
    model: nn.Module,
    lr: float,
    loss: LossLike = "cross_entropy",
    *,
    adamw_lr: float | None = None,
    adamw_wd: float | None = None,
    weight_decay: float = 0.0,
    **options: Any,
) -> FirstOrder:
    """Muon on the hidden weight matrices, AdamW on the rest: ``pytorch_optimizer.Muon`` with its two kinds of groups.

    Hidden are the weights of two and more dimensions but the first and the last of the model, frozen or not: the first
    reads the inputs, the last gives the outputs. AdamW's rate and decay are Muon's unless given (a schedule moves
    both); ``options`` are the class's own (``momentum``, ``nesterov``, ``ns_steps``, ``adamw_betas``, ...).

    Raises ``ValueError`` for a model without a hidden weight matrix, ``ImportError`` without pytorch-optimizer.
    """
    from pytorch_optimizer import Muon

    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in [p for p in model.parameters() if p.ndim >= 2][1:-1] if p.requires_grad]
    if not hidden:
        raise ValueError(f"{type(model).__name__} has no hidden weight matrix for Muon; use torch.optim:AdamW")
    chosen = set(map(id, hidden))
    rest = [p for p in parameters if id(p) not in chosen]
    decay = weight_decay if adamw_wd is None else adamw_wd
    groups = [
        {"params": hidden, "lr": lr, "weight_decay": weight_decay, "use_muon": True},
        {"params": rest, "lr": lr if adamw_lr is None else adamw_lr, "weight_decay": decay, "use_muon": False},
    ]
    return FirstOrder(model, Muon, loss, groups, lr=lr, **options)
