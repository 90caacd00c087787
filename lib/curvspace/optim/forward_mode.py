r"""Products with the Jacobian of one network at one point, which share their primal pass.

With outputs :math:`z = \phi(\theta, x)` and Jacobian :math:`J = \partial z/\partial\theta`, a
:class:`Linearised` gives

- ``outputs``: z, with the graph that a backward pass needs, and ``first``: :math:`J t_0` from the same pass;
- ``push(t)``: :math:`J t` for another direction at the same point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from curvspace.curvature.as_written import as_written, plain_kernels
from curvspace.curvature.linearisation import random_like, require_linear
from curvspace.curvature.memory import is_out_of_memory
from curvspace.curvature.second_order import SecondOrderLayers
from curvspace.differentiation import pull_back, require_second_derivatives
from curvspace.functional import call_with, flatten, trainable_parameters
from curvspace.inner import inner, norm
from curvspace.inputs import Inputs, call
from curvspace.optim.draws import random_state, randomness_from, set_random_state
from curvspace.optim.dual_numbers import SharedPrimal, unpack_dual
from curvspace.outputs import pack


class Linearised:
    r"""The network at its present parameters on one batch: :math:`z`, :math:`J t_0`, ``push(t)`` :math:`= J t`.

    The first pass acts as the model's own call does: it moves running statistics (once, and without a tangent)
    and draws dropout masks. ``push`` sees the same masks and leaves buffers and generators as they are; so does
    ``replay``, which calls the model again with whatever parameters it has by then.

    Parameters
    ----------
    tangents
        :math:`t_0`, one tensor a trainable parameter, in their shapes.
    taken
        What of the model's outputs is z (of mappings and tuples, their tensors one after the other); ``unpack``
        gives it back in its own form.
    """

    outputs: Tensor
    first: Tensor
    unpack: Callable[[Tensor], Any]

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        tangents: Sequence[Tensor],
        taken: Callable[[Any], Any] = lambda raw: raw,
    ):
        self.model = model
        self.inputs = inputs
        self.taken = taken
        self.parameters = trainable_parameters(model)
        self._device = next(iter(self.parameters.values())).device
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._random_state = random_state(self._device)
        with torch.enable_grad(), as_written(), plain_kernels(model.modules()):
            self._begin(tangents)

    def check(self, tangents: Sequence[Tensor]) -> None:
        """Raise if the products are not those of one Jacobian, which costs about as much as they do.

        ``tangents``: those of the first pass.

        Raises
        ------
        RuntimeError
            If forward-mode products are not the transpose of the backward ones, or these are no linear map.
        ValueError
            If a layer has no second derivative where it is needed.
        """
        raise NotImplementedError

    def _begin(self, tangents: Sequence[Tensor]) -> None:
        """The first pass: sets ``outputs``, with their graph, and ``first``."""
        raise NotImplementedError

    def push(self, tangents: Sequence[Tensor]) -> Tensor:
        """J t, of the outputs' shape, for one tensor a trainable parameter."""
        raise NotImplementedError

    def pull(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        r""":math:`J^\top u`, one tensor a trainable parameter. May free the graph: once per linearisation."""
        raise NotImplementedError

    @torch.no_grad()
    def replay(self) -> Tensor:
        """The model's outputs at its present parameters, with this pass's buffers and dropout masks."""
        with self._same_again():
            torch.clear_autocast_cache()  # it may hold casts of what the parameters were
            return pack(self.taken(call_with(self.model, self._fresh_buffers(), self.inputs)))[0]

    @contextmanager
    def _same_again(self) -> Iterator[None]:
        """Inside, a call of the model is as its first one was."""
        with randomness_from(self._random_state, self._device), as_written(), plain_kernels(self.model.modules()):
            yield

    def _fresh_buffers(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self._buffers.items()}


class ForwardMode(Linearised):
    """By dual numbers: the cheapest way, where every layer has a forward-mode rule."""

    def _begin(self, tangents: Sequence[Tensor]) -> None:
        self._mode = SharedPrimal()
        self.outputs, self.first = self._dual_pass(self.parameters, tangents)

    def _dual_pass(
        self, tensors: dict[str, Tensor], tangents: Sequence[Tensor], buffers: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level(), self._mode:
            duals = {n: forward_ad.make_dual(p, t) for (n, p), t in zip(tensors.items(), tangents, strict=True)}
            packed, self.unpack = pack(self.taken(call_with(self.model, {**duals, **(buffers or {})}, self.inputs)))
            z, dz = unpack_dual(packed)
            if dz is None and (z if buffers is None else self.outputs).requires_grad:
                raise RuntimeError(f"{type(self.model).__name__} has lost its tangents on the way to the outputs")
            return z, torch.zeros_like(z) if dz is None else dz.detach()

    @torch.no_grad()
    def push(self, tangents: Sequence[Tensor]) -> Tensor:
        self._mode.replay()
        detached = {name: p.detach() for name, p in self.parameters.items()}
        with self._same_again():
            return self._dual_pass(detached, tangents, self._fresh_buffers())[1]

    def pull(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        return self._pull(cotangent, retain_graph=False)

    def _pull(self, cotangent: Tensor, retain_graph: bool) -> tuple[Tensor, ...]:
        parameters = list(self.parameters.values())
        return pull_back([self.outputs], parameters, [cotangent], retain_graph=retain_graph, materialize_grads=True)

    def check(self, tangents: Sequence[Tensor]) -> None:
        r""":math:`u^\top (J t)` against :math:`(J^\top u)^\top t` for a random u, with t_0 and with a random t.

        They differ where the model computes under ``torch.no_grad()``, which stops a backward pass but no tangent,
        where a forward-mode rule is wrong, and where compiled code drops tangents after its first call.
        """
        if not self.outputs.requires_grad:
            return
        generator = torch.Generator().manual_seed(0)  # the model's own draws stay as they are
        drawn = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        random = [drawn(p.shape).to(p) for p in self.parameters.values()]
        u = drawn(self.outputs.shape).to(self.outputs)
        pulled = flatten(self._pull(u, retain_graph=True))
        rounding = _rounding(self.outputs) ** (1 / 3)
        for along, found in ((tangents, self.first), (random, self.push(random))):
            pushed = found.reshape(-1).to(pulled)
            forward, backward = inner(u.reshape(-1).to(pulled), pushed), inner(pulled, flatten(along))
            size = torch.stack([norm(pushed), forward.abs(), backward.abs()]).max()  # |J t|: the spread over random u
            if (forward - backward).abs() > rounding * size:
                raise RuntimeError(f"forward-mode derivatives of {type(self.model).__name__} are not its backward ones")


class DoubleBackward(Linearised):
    r"""By reverse mode alone: :math:`J t` is the derivative of the linear map :math:`u \mapsto J^\top u`.

    The graph of that map is kept, so that this costs more memory, and about one backward pass more, than dual numbers;
    but it only needs layers that can be differentiated twice.
    """

    def _begin(self, tangents: Sequence[Tensor]) -> None:
        parameters = list(self.parameters.values())
        with SecondOrderLayers(linear=True):
            self.outputs, self.unpack = pack(self.taken(call(self.model, self.inputs)))
        try:
            self._u = random_like(self.outputs).requires_grad_()
            pulled = pull_back([self.outputs], parameters, [self._u], create_graph=True, materialize_grads=True)
            self._live = [i for i, w in enumerate(pulled) if w.requires_grad]
            self._pulled = [pulled[i] for i in self._live]
            self.first = self.push(tangents)
        except (NotImplementedError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise self._no_derivatives(error) from error

    def check(self, tangents: Sequence[Tensor]) -> None:
        try:
            require_second_derivatives(self._pulled, "")
        except RuntimeError as error:
            raise self._no_derivatives(error) from error
        require_linear(self.pull, self._u.detach(), self.outputs, tuple(self.parameters.values()), self.model)

    def _no_derivatives(self, error: Exception) -> ValueError:
        return ValueError(
            f"{type(self.model).__name__} has a layer with neither forward-mode nor second derivatives, "
            f"which a Gauss-Newton product needs; replace it ({str(error.__cause__ or error).splitlines()[0]})"
        )

    def push(self, tangents: Sequence[Tensor]) -> Tensor:
        along = [tangents[i] for i in self._live]
        return pull_back(self._pulled, [self._u], along, retain_graph=True, materialize_grads=True)[0]

    def pull(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        parameters = list(self.parameters.values())
        return pull_back([self.outputs], parameters, [cotangent], retain_graph=True, materialize_grads=True)


def _rounding(outputs: Tensor) -> float:
    """The relative rounding of the passes that lead to these outputs, those inside autocast being coarser."""
    kind = outputs.device.type
    types = [outputs.dtype, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
    return max(torch.finfo(t).eps for t in types)


def _scripted(model: nn.Module) -> bool:
    """Whether a module is TorchScript's, whose optimised graphs drop tangents from the second call on."""
    return any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())


def linearise(
    model: nn.Module,
    inputs: Inputs,
    tangents: Sequence[Tensor],
    way: type[Linearised] = ForwardMode,
    taken: Callable[[Any], Any] = lambda raw: raw,
    check: bool = True,
) -> Linearised:
    """The model linearised by ``way``, or by :class:`DoubleBackward` where dual numbers cannot serve.

    That is where a layer has no forward-mode rule, where a module is TorchScript's, and where ``check`` (one more
    product each way) finds that J is not the transpose of J': a model that computes under ``torch.no_grad()``
    means a constant, but a tangent passes. Buffers and generators move once, whichever way it goes.

    Raises
    ------
    ValueError
        If a layer has neither.
    """
    device = next(iter(trainable_parameters(model).values())).device
    before = random_state(device)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    if check and _scripted(model):
        way = DoubleBackward

    def linearised(way: type[Linearised]) -> Linearised:
        point = way(model, inputs, tangents, taken)
        if check:
            point.check(tangents)
        return point

    try:
        return linearised(way)
    except (NotImplementedError, RuntimeError) as error:
        if way is DoubleBackward or is_out_of_memory(error):
            raise
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    set_random_state(before, device)
    return linearised(DoubleBackward)


Linearisation = linearise
"""The same by the name of what it gives: ``Linearisation(model, x, tangents).push(t)``."""
