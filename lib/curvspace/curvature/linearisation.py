r"""Products with the curvature of one batch, whose forward and backward passes are done once and kept.

With :math:`L(\theta) = w\,\ell(z(\theta), y)` for one batch of weight w,

.. math:: H v = \nabla_\theta (\nabla_\theta L^\top v), \qquad
          G v = w\,J^\top \nabla_z^2\ell\; J v, \quad J = \partial z/\partial\theta.

The graph of the first gradient stays in memory, so a product costs one pass through it instead of starting anew.
Everything is plain ``torch.autograd.grad``: ``jacrev`` under another derivative is silently wrong through some
normalisation layers, and tracing a linearisation costs as much as several products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.batches import take
from curvspace.curvature.frozen import FrozenModel
from curvspace.curvature.memory import is_out_of_memory
from curvspace.curvature.second_order import SecondOrderLayers
from curvspace.differentiation import pull_back, require_second_derivatives
from curvspace.functional import flatten
from curvspace.inner import inner, norm
from curvspace.inputs import Inputs, tensors_in
from curvspace.losses import Loss
from curvspace.module_state import modules_within
from curvspace.outputs import pack
from curvspace.tensors import version_of

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Batch:
    """Examples that are evaluated together, and their weight in the objective (their share of all examples).

    ``flags``: which tensors of inputs and targets have the examples along their first dimension, in order.
    """

    inputs: Inputs
    targets: Any
    weight: float
    index: int
    size: int
    flags: tuple[bool, ...]

    def examples(self, index: slice | Tensor) -> Batch:
        """Some of the examples, with the weight and number of all."""
        inputs, targets = take((self.inputs, self.targets), index, self.flags)
        size = len(range(self.size)[index]) if isinstance(index, slice) else len(index)
        return replace(self, inputs=inputs, targets=targets, size=size)

    @property
    def versions(self) -> list[int]:
        """How often each of its tensors has been changed in place."""
        return [version_of(t) for t in (*tensors_in(self.inputs), *tensors_in(self.targets))]


@dataclass(frozen=True)
class Point:
    """Where curvature is taken: the function, the loss, and a copy of the parameters and constants."""

    function: FrozenModel
    loss: Loss
    parameters: tuple[Tensor, ...]
    constants: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]

    @classmethod
    def here(cls, function: FrozenModel, loss: Loss) -> Point:
        """The model's present parameters, as copies that require gradients."""
        modules = dict(function.model.named_modules())
        return cls(function, loss, function.parameters(), function.constants(), modules)

    @contextmanager
    def _in_force(self, batch: Batch) -> Iterator[None]:
        """The model at this point, whose modules are to be those that it was taken of."""
        model = self.function.model
        present = dict(model.named_modules())
        changed = [n for n in {**self.modules, **present} if present.get(n) is not self.modules.get(n)]
        if changed:
            raise RuntimeError(
                f"the modules of {type(model).__name__} have changed since this operator was made ({changed[0]!r} is "
                "new, another or gone): make a new one"
            )
        with self.function.policy_in_force(), self.function.at(self.parameters, self.constants, batch.index):
            yield

    def outputs(self, batch: Batch) -> Any:
        """What the loss takes of the model's outputs."""
        with self._in_force(batch):
            return self._outputs(batch)

    def value(self, batch: Batch) -> Tensor:
        """The batch's mean loss, of which the model's outputs and the loss's own use of the parameters are part."""
        return self.evaluate(batch)[1]

    def evaluate(
        self,
        batch: Batch,
        between: Callable[[Any], Any] = lambda outputs: outputs,
        around_loss: AbstractContextManager[Any] | None = None,
    ) -> tuple[Any, Tensor]:
        """``between`` of the outputs, and the loss of that, both with the model at these parameters."""
        with self._in_force(batch):
            outputs = between(self._outputs(batch))
            with around_loss or nullcontext():
                return outputs, self.loss_of(outputs, batch)

    def _outputs(self, batch: Batch) -> Any:
        return self.loss.outputs(self.function.outputs(self.function.cast(batch.inputs)))

    def loss_of(self, outputs: Any, batch: Batch) -> Tensor:
        """The batch's mean loss.

        Raises
        ------
        ValueError
            If outputs and targets do not fit together, naming the batch.
        """
        targets = self.function.cast(batch.targets)
        own = set(modules_within(self.function.model)) if self.loss.stateful else ()
        try:
            with self.loss.at_rest(own):  # the model's own modules are, where it is evaluated
                value = self.loss(outputs, targets)
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            shapes = f"outputs {_described(outputs)}, targets {_described(targets)}"
            advice = "; derivatives of the outputs by inputs are to be outputs themselves" * _of_outputs(error)
            raise ValueError(
                f"batch {batch.index}: the loss {self.loss.name} failed on {shapes}: {error}{advice}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss {self.loss.name} must be one number, a mean over the batch; got {shape}")
        return value.reshape(())

    def finite(self, value: Tensor, batch: Batch) -> Tensor:
        if not torch.isfinite(value):
            raise ValueError(f"batch {batch.index}: the loss is {value.item()} at these parameters")
        return value

    def gradient(self, value: Tensor, *, create_graph: bool = False) -> list[Tensor | None]:
        """See :meth:`~curvspace.curvature.frozen.FrozenModel.gradient`."""
        return self.function.gradient(value, self.parameters, create_graph=create_graph)


def _of_outputs(error: Exception) -> bool:
    """Whether a loss differentiated outputs that were cut off from the model."""
    return "require grad" in str(error) or "differentiated Tensor" in str(error)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return type(value).__name__


def mean_gradient(point: Point, batches: Sequence[Batch]) -> Tensor:
    """The gradient of the weighted loss over batches, (P,)."""
    size = sum(p.numel() for p in point.parameters)
    result = torch.zeros(size, dtype=point.function.dtype, device=point.function.device)
    for b in batches:
        with torch.enable_grad():
            found = point.gradient(b.weight * point.finite(point.value(b), b))
        parts = (torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, point.parameters, strict=True))
        result += flatten(parts)
    return result


class Linearisation:
    """Curvature of one batch at one point, ready to multiply."""

    def __init__(self, point: Point, batch: Batch):
        raise NotImplementedError

    def product(self, v: Tensors) -> Tensors:
        """The product with one vector, in the parameters' shapes."""
        raise NotImplementedError

    def products(self, vs: Tensors) -> Tensors:
        """The products with m vectors at once, stacked in front: (m, *shape)."""
        raise NotImplementedError


class HessianLinearisation(Linearisation):
    """H v by backward through the kept graph of the gradient."""

    def __init__(self, point: Point, batch: Batch):
        self.theta = point.parameters
        with torch.enable_grad():
            with SecondOrderLayers():
                loss = batch.weight * point.finite(point.value(batch), batch)
            gradient = point.gradient(loss, create_graph=True)
        self.live = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]  # others are constant
        self.gradient = [g for g in gradient if g is not None and g.requires_grad]

    def _multiply(self, vs: Tensors, batched: bool) -> Tensors:
        live = [vs[i] for i in self.live]
        return pull_back(self.gradient, self.theta, live, batched=batched, retain_graph=True, materialize_grads=True)

    def product(self, v: Tensors) -> Tensors:
        return self._multiply(v, False) if self.live else [torch.zeros_like(p) for p in self.theta]

    def products(self, vs: Tensors) -> Tensors:
        return self._multiply(vs, True) if self.live else [torch.zeros_like(v) for v in vs]


class NotLinear(RuntimeError):
    """A backward pass that is no linear map of the cotangent: there is no Jacobian."""


class JacobianLinearisation:
    """J v and Jᵀu of outputs z(theta). J v is the derivative of the linear map u -> Jᵀu, whose graph is kept.

    It is taken at a random u, because some backward passes have another derivative at 0 (``torch.logcumsumexp``).
    """

    def __init__(self, function: FrozenModel, theta: Tensors, outputs: Callable[[], Tensor]):
        self.function, self.theta = function, theta
        with torch.enable_grad():
            with SecondOrderLayers(linear=True):
                self.z = outputs()
            self.u = random_like(self.z).requires_grad_()
            inner = self.z.reshape(-1) @ self.u.reshape(-1)
            vjp = function.gradient(inner, theta, create_graph=True)
        self.live = [i for i, w in enumerate(vjp) if w is not None and w.requires_grad]
        self.vjp = [w for w in vjp if w is not None and w.requires_grad]

    def forward(self, v: Tensors, batched: bool = False) -> Tensor:
        """J v for v in the parameters' shapes (``batched``: m of them, stacked in front)."""
        tangents = [v[i] for i in self.live]
        (jv,) = pull_back(self.vjp, [self.u], tangents, batched=batched, retain_graph=True)
        if not self.function.backward_is_linear:
            self._require_transpose(*(([t[0] for t in tangents], jv[0]) if batched else (tangents, jv)))
            self.function.backward_is_linear = True
        return jv

    def _require_transpose(self, tangents: Tensors, jv: Tensor) -> None:
        r""":math:`u^\top J v = v^\top J^\top u` at the u where the derivative is taken: once a model, in two sums.

        Where they differ, :meth:`require_linear` decides.
        """
        pulled, v, u = flatten(w.detach() for w in self.vjp), flatten(tangents), self.u.detach().reshape(-1)
        forward, backward = inner(u, jv.reshape(-1)), inner(pulled, v)
        size = torch.stack([norm(jv.reshape(-1)), forward.abs(), backward.abs()]).max()
        if (forward - backward).abs() > max(torch.finfo(pulled.dtype).eps ** (1 / 3), 0.01) * size:
            self.require_linear()

    def require_linear(self) -> None:
        """:class:`NotLinear` where the backward pass is no linear map, which three more of them show."""
        require_linear(self.backward, self.u.detach(), self.z, self.theta, self.function.model)

    def backward(self, u: Tensor, batched: bool = False) -> Tensors:
        """Jᵀu for u of the outputs' shape (``batched``: m of them, stacked in front)."""
        return pull_back([self.z], self.theta, [u], batched=batched, retain_graph=True, materialize_grads=True)


def require_linear(pull: Callable[[Tensor], Tensors], u: Tensor, z: Tensor, theta: Tensors, model: nn.Module) -> None:
    r""":class:`NotLinear` unless :math:`J^\top(u - 2w) = J^\top u - 2J^\top w` for a random w, with ``pull`` the map.

    That shows also where it is homogeneous, as of a hook that keeps positive entries, which doubling u would not. Not
    where :math:`J^\top u` is nothing but rounding beside :math:`|z|\,|u|/|\theta|`, z(theta) being the outputs.
    """
    w = random_like(u, seed=1)
    of_u, of_w, of_both = (flatten(pull(one)) for one in (u, w, u - 2 * w))
    eps = torch.finfo(of_u.dtype).eps
    nothing = (
        100 * eps * norm(z.detach().reshape(-1)) * norm(u.reshape(-1)) / norm(flatten(theta).detach()).clamp(min=1)
    )
    if norm(of_both - of_u + 2 * of_w) > max(eps ** (1 / 3), 0.01) * (norm(of_u) + 2 * norm(of_w)) + nothing:
        raise NotLinear(
            f"the backward pass of {type(model).__name__} is not linear (a hook or a function of its own that cuts off "
            "or scales gradients?), so that it has no Jacobian: switch that off while you measure"
        )


def random_like(z: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator(z.device).manual_seed(seed)  # the model's own draws stay as they are
    return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


class OutputCurvature:
    """The loss's Hessian in the outputs, and in the parameters as far as the loss reads them itself."""

    def __init__(self, point: Point, batch: Batch, z: Tensor, loss: Tensor):
        """From outputs z that are cut off from the model, and the loss of them."""
        self.z, self.theta = z, point.parameters
        self.read: list[int] = []
        self.closed_form = point.loss.closed_form
        if self.closed_form:
            self.loss, self.targets = point.loss, point.function.cast(batch.targets)
            self.z = z.detach()
            return
        with torch.enable_grad():
            gradient = torch.autograd.grad(loss, [z, *self.theta], create_graph=True, allow_unused=True)
        require_second_derivatives(gradient)
        self.read = [i for i, g in enumerate(gradient[1:]) if g is not None]
        self.gradient = [g for g in gradient if g is not None and g.requires_grad]
        self.live = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]

    def vanishes(self) -> bool:
        """Whether a loss without closed form, of the outputs alone, turns out (piecewise) linear in them."""
        if self.closed_form or self.read:
            return False
        return not self.product(random_like(self.z), [])[0].any()

    def product(self, u: Tensor, v: Tensors) -> tuple[Tensor, list[Tensor]]:
        """The product with (u, v), u in the outputs and v in the parameters; of those only ``read`` matter."""
        if self.closed_form:
            return self.loss.hessian_product(self.z, self.targets, u), []
        if not self.live:
            return torch.zeros_like(u), [torch.zeros_like(self.theta[i]) for i in self.read]
        along = [(u, *v)[i] for i in self.live]
        of = [self.z, *(self.theta[i] for i in self.read)]
        found = pull_back(self.gradient, of, along, retain_graph=True, materialize_grads=True)
        return found[0], list(found[1:])


class GaussNewtonLinearisation(Linearisation):
    r"""G v by J, the loss's Hessian in the outputs, and Jᵀ.

    Where the loss reads the parameters itself (a penalty, a temperature), L(z(theta), theta) is linearised in z only:
    G = [J; I]ᵀ ∇²L(z, theta) [J; I], which has the Hessian of a penalty in full. ``diverged`` lets a loss be nan.
    """

    @staticmethod
    def outputs_from(z: Tensor) -> Tensor:
        """The outputs at which the loss has its second derivative."""
        return z

    def __init__(self, point: Point, batch: Batch, diverged: bool = False):
        self.weight = batch.weight
        kept: dict[str, Any] = {}

        def outputs() -> Tensor:
            def cut_off(raw: Any) -> Any:
                kept["z"], unpack = pack(raw)
                kept["leaf"] = self.outputs_from(kept["z"].detach()).requires_grad_()
                return unpack(kept["leaf"])

            _, kept["loss"] = point.evaluate(batch, cut_off, SecondOrderLayers())  # not linear: it has a Hessian
            return kept["z"]

        self.jacobian = JacobianLinearisation(point.function, point.parameters, outputs)
        if not diverged:
            point.finite(kept["loss"], batch)
        self.curvature = OutputCurvature(point, batch, kept["leaf"], kept["loss"])

    def product(self, v: Tensors) -> Tensors:
        hu, hv = self.curvature.product(self.jacobian.forward(v), v)
        result = list(self.jacobian.backward(self.weight * hu))
        for i, own in zip(self.curvature.read, hv, strict=True):
            result[i] = result[i] + self.weight * own
        return result

    def products(self, vs: Tensors) -> Tensors:
        ju = self.jacobian.forward(vs, batched=True)
        pairs = [self.curvature.product(u, [v[i] for v in vs]) for i, u in enumerate(ju)]
        result = list(self.jacobian.backward(torch.stack([self.weight * hu for hu, _ in pairs]), batched=True))
        for n, i in enumerate(self.curvature.read):
            result[i] = result[i] + self.weight * torch.stack([hv[n] for _, hv in pairs])
        return result


class UnsaturatedLinearisation(GaussNewtonLinearisation):
    r"""The same with the loss's Hessian at outputs 0, where nothing in it cancels: :math:`J^\top \nabla_z^2\ell(0) J`.

    Far from there a softmax's :math:`p\circ u - p\,(p^\top u)` is a small difference of terms of that size.
    """

    @staticmethod
    def outputs_from(z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def __init__(self, point: Point, batch: Batch):
        super().__init__(point, batch, diverged=True)
