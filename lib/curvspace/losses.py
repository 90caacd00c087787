r"""Losses of a batch, with the two derivatives in the outputs that curvature products need.

For outputs z and targets y a loss gives

- ``L(z, y)`` itself, a scalar;
- ``gradient(z, y)``: :math:`\partial L/\partial z`, the shape of z;
- ``hessian_product(z, y, u)``: :math:`(\partial^2 L/\partial z^2) u`, the shape of z;
- ``weight(y)``: how much the batch counts beside others.

The losses known here by name are weighted means, :math:`L = S/W` with S a sum over the examples and W the sum of
their weights (labels that count, class weights, entries), or such a sum alone (``reduction="sum"``). Parts of a batch
are put together by W, so that the whole has the value that torch gives it; so are those of torch's other losses, by
their reduction. Of any other callable only its value is known: it counts by its number of examples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace.functional import batch_size, left_alone, pull_back, require_second_derivatives
from curvspace.outputs import logits

Reduction = Literal["mean", "sum"]


class Loss:
    """Any callable(outputs, targets) -> mean loss over the examples; its derivatives by autograd on detached outputs.

    The callable gets the model's outputs as they are, also mappings and tuples.
    """

    reduction: Reduction = "mean"
    closed_form = False
    linear = False
    """Whether L is linear in the outputs by definition, so that every Gauss-Newton matrix is zero."""

    def __init__(self, function: Callable[[Any, Any], Tensor]):
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        return self._function(outputs, targets)

    def outputs(self, raw: Any) -> Any:
        """What of the model's outputs the loss takes."""
        return raw

    def weight(self, targets: Any) -> float:
        """The batch's weight W beside other batches."""
        return float(batch_size(targets))

    def adds_up(self, targets: Any) -> bool:
        """Whether L is known to be a sum over the examples divided by the sum of their weights."""
        return False

    def modules(self) -> list[nn.Module]:
        """Modules that it is or calls, whose state an evaluation may move (statistics, centres, counters)."""
        return _modules_of(self._function, 0)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        with torch.enable_grad(), left_alone(self.modules()):
            z = outputs.detach().requires_grad_()
            return torch.autograd.grad(self(z, targets), z)[0]

    def hessian_product(self, outputs: Tensor, targets: Any, u: Tensor) -> Tensor:
        with torch.enable_grad(), left_alone(self.modules()):
            z = outputs.detach().requires_grad_()
            (g,) = torch.autograd.grad(self(z, targets), z, create_graph=True)
            require_second_derivatives([g])
            if not g.requires_grad:  # linear in z
                return torch.zeros_like(u)
            return pull_back([g], [z], [u.detach()], materialize_grads=True)[0]


class TorchLoss(Loss):
    """A loss of torch's that has no closed form here: a mean over the entries, one over the examples, or a sum."""

    def __init__(self, function: Callable[[Any, Any], Tensor], reduction: str, over_entries: bool):
        super().__init__(function)
        self.name = getattr(getattr(function, "func", None), "__name__", self.name)
        if reduction not in ("mean", "sum", "batchmean"):
            raise ValueError(f'{self.name}: reduction must be "mean" or "sum", got {reduction!r}: a loss is one number')
        self.reduction = "sum" if reduction == "sum" else "mean"
        self._over_entries = over_entries and reduction == "mean"

    def modules(self) -> list[nn.Module]:
        return []  # they have no state

    def weight(self, targets: Any) -> float:
        if self.reduction == "sum":
            return 1.0
        return float(_tensor(targets, self.name).numel()) if self._over_entries else super().weight(targets)


class KnownLoss(Loss):
    """A loss with closed-form derivatives, of a tensor or of outputs where ``outputs.logits`` finds one."""

    name = ""
    closed_form = True

    def __init__(self, reduction: Reduction = "mean"):
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{self.name}: reduction must be "mean" or "sum", got {reduction!r}: a loss is one number')
        self.reduction = reduction

    def modules(self) -> list[nn.Module]:
        return []

    def outputs(self, raw: Any) -> Tensor:
        return logits(raw)

    def adds_up(self, targets: Any) -> bool:
        return True

    def weight(self, targets: Any) -> float:
        return float(self.normaliser(_tensor(targets, self.name))) if self.reduction == "mean" else 1.0

    def normaliser(self, targets: Tensor) -> Tensor | int:
        """W of a mean over these targets."""
        raise NotImplementedError

    def _divisor(self, targets: Tensor) -> Tensor | int:
        """W of a mean, 1 of a sum. Where nothing counts, both derivatives over it are 0, though the mean is 0/0."""
        if self.reduction != "mean":
            return 1
        total = self.normaliser(targets)
        if not isinstance(total, Tensor):
            return total
        return total.masked_fill(total == 0, math.inf if total.is_floating_point() else 1)


class CrossEntropy(KnownLoss):
    r"""Softmax cross-entropy: all of ``torch.nn.functional.cross_entropy``.

    .. math:: L = -\tfrac1W \sum_{n,c} t_{nc} \log p_{nc}, \qquad
              \partial_z L = \tfrac1W (s\,p - t), \qquad
              H_L u = \tfrac{s}{W}\,(p\circ u - p\,(p^\top u)), \qquad s_n = \sum_c t_{nc},

    with p the softmax of z and t the targets after class weights w and smoothing. Outputs (N, C) or (N, C, ...).
    Targets: integers of any type (N, ...), then W is the sum of their class weights, or probabilities of the outputs'
    shape, then W is the number of positions. Labels equal to ``ignore_index`` do not count. Where none counts, L is NaN
    and its derivatives are 0.
    """

    name = "cross_entropy"

    def __init__(
        self,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ):
        super().__init__(reduction)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.class_weight = weight
        self.ignore_index = ignore_index

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = logits(outputs)
        y = targets if targets.is_floating_point() else targets.long()
        return F.cross_entropy(
            z,
            y,
            _like(self.class_weight, z),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def normaliser(self, targets: Tensor) -> Tensor | int:
        if targets.is_floating_point():
            return targets.numel() // targets.shape[min(1, targets.ndim - 1)]
        return self._label_weights(targets, self.class_weight).sum()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        dim = min(1, outputs.ndim - 1)
        t = self._soft_targets(outputs, targets)
        return (outputs.softmax(dim) * t.sum(dim, keepdim=True) - t) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        dim = min(1, outputs.ndim - 1)
        p = outputs.softmax(dim)
        pu = p * u
        return (pu - p * pu.sum(dim, keepdim=True)) * self.position_weights(outputs, targets).unsqueeze(dim)

    def position_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """s/W, one number an example and position: how much of the model's own Fisher matrix there is in H_L."""
        return self._row_weights(outputs, targets) / self._divisor(targets)

    def _label_weights(self, labels: Tensor, class_weight: Tensor | None) -> Tensor:
        """The weight of each label: zero for ignored ones."""
        labels = labels.long()  # in a shorter type another label may equal ignore_index
        counts = labels != self.ignore_index
        if class_weight is None:
            return counts
        w = class_weight.to(labels.device)
        return w[torch.where(counts, labels, 0)] * counts

    def _soft_targets(self, z: Tensor, targets: Tensor) -> Tensor:
        """t, the shape of z."""
        dim, c, smoothing = min(1, z.ndim - 1), z.shape[min(1, z.ndim - 1)], self.label_smoothing
        w = _like(self.class_weight, z)
        if targets.is_floating_point():
            t = targets.to(z.dtype)
            counts = None
        else:
            labels = targets.long()
            counts = labels != self.ignore_index
            t = F.one_hot(torch.where(counts, labels, 0), c).movedim(-1, dim).to(z.dtype)
        if smoothing:
            t = (1 - smoothing) * t + smoothing / c
        if w is not None:
            t = t * w.view(-1, *[1] * (z.ndim - 1 - dim))
        return t if counts is None else t * counts.unsqueeze(dim)

    def _row_weights(self, z: Tensor, targets: Tensor) -> Tensor:
        """s, one number an example and position."""
        if targets.is_floating_point():
            return self._soft_targets(z, targets).sum(min(1, z.ndim - 1))
        w = _like(self.class_weight, z)
        s = self._label_weights(targets, w).to(z.dtype)
        if w is not None and self.label_smoothing:
            smooth = (self.label_smoothing / len(w)) * w.sum() * (targets.long() != self.ignore_index)
            s = (1 - self.label_smoothing) * s + smooth
        return s


class NegativeLogLikelihood(KnownLoss):
    r"""``nll_loss`` on log-probabilities: :math:`L = -\tfrac1W \sum_n w_{y_n} z_{n y_n}`.

    Linear in the outputs, so :math:`H_L = 0` and every Gauss-Newton matrix is zero by definition; the curvature of the
    log-softmax belongs to the model. For the usual matrix leave it out of the model and take ``"cross_entropy"``.
    """

    name = "nll_loss"
    linear = True

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, reduction: Reduction = "mean"):
        super().__init__(reduction)
        self._labels = CrossEntropy(0.0, weight, ignore_index, reduction)

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z, labels = logits(outputs), self._labels
        w = _like(labels.class_weight, z)
        y = targets if targets.is_floating_point() else targets.long()
        return F.nll_loss(z, y, w, ignore_index=labels.ignore_index, reduction=self.reduction)

    def normaliser(self, targets: Tensor) -> Tensor | int:
        return self._labels.normaliser(targets)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self._labels._soft_targets(outputs, targets) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


class BinaryCrossEntropy(KnownLoss):
    r"""Sigmoid cross-entropy, mean over all entries: all of ``binary_cross_entropy_with_logits``.

    .. math:: \partial_z L = \tfrac{w}{W}\,(a\,\sigma(z) - \pi y), \qquad
              H_L u = \tfrac{w}{W}\,a\,\sigma(z)(1-\sigma(z))\,u, \qquad a = \pi y + 1 - y,

    with w the ``weight`` and :math:`\pi` the ``pos_weight`` (broadcast to the outputs), W the number of entries.
    """

    name = "binary_cross_entropy_with_logits"

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: Reduction = "mean"):
        super().__init__(reduction)
        self.entry_weight, self.pos_weight = weight, pos_weight

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = logits(outputs)
        w, pi = _like(self.entry_weight, z), _like(self.pos_weight, z)
        y = targets.to(z.dtype)
        return F.binary_cross_entropy_with_logits(z, y, w, pos_weight=pi, reduction=self.reduction)

    def adds_up(self, targets: Tensor) -> bool:
        """Not where weights of single examples came with the loss: they cannot be cut along."""
        return not any(
            w is not None and w.ndim == targets.ndim and w.ndim > 0 and w.shape[0] > 1
            for w in (self.entry_weight, self.pos_weight)
        )

    def normaliser(self, targets: Tensor) -> int:
        return targets.numel()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        w, pi, y = self._factors(outputs, targets)
        return w * ((pi * y + 1 - y) * outputs.sigmoid() - pi * y)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        w, pi, y = self._factors(outputs, targets)
        p = outputs.sigmoid()
        return w * (pi * y + 1 - y) * p * (1 - p) * u

    def _factors(self, z: Tensor, targets: Tensor) -> tuple[Any, Any, Tensor]:
        w, pi = _like(self.entry_weight, z), _like(self.pos_weight, z)
        divisor = self._divisor(targets)
        return (1 / divisor if w is None else w / divisor), (1 if pi is None else pi), targets.to(z.dtype)


class SquaredError(KnownLoss):
    r"""Half the squared distance, mean over examples.

    .. math:: L = \frac1N\sum_n \tfrac12|z_n - y_n|^2, \qquad H_L = I/N
    """

    name = "mse"

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = _same_shape(self.name, logits(outputs), targets)
        return 0.5 * (z - targets).square().sum() / self._divisor(targets)

    def normaliser(self, targets: Tensor) -> int:
        return targets.shape[0]

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return u / self._divisor(targets)


class MeanSquaredError(KnownLoss):
    r"""torch's ``mse_loss``: the mean over all entries, without the half; :math:`H_L = 2I/W`, W entries."""

    name = "mse_loss"

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = _same_shape(self.name, logits(outputs), targets)
        return (z - targets).square().sum() / self._divisor(targets)

    def normaliser(self, targets: Tensor) -> int:
        return targets.numel()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * (outputs - targets) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return 2 * u / self._divisor(targets)


KNOWN: dict[str, type[KnownLoss]] = {
    kind.name: kind
    for kind in (CrossEntropy, SquaredError, MeanSquaredError, BinaryCrossEntropy, NegativeLogLikelihood)
}


def options_of(loss: str | Loss | Callable[[Any, Any], Tensor]) -> list[Any]:
    """What :func:`get_loss` and a loss's weights read of it, and may be replaced or overwritten later."""
    if isinstance(loss, nn.Module):
        return [getattr(loss, name, None) for name in ("weight", "pos_weight", *_PLAIN_OPTIONS)]
    if isinstance(loss, functools.partial):
        return list(loss.keywords.values())
    return list(vars(getattr(loss, "_labels", loss)).values()) if isinstance(loss, Loss) else []


def plain_globals(loss: Any) -> list[Any]:
    """The numbers and words among the global variables that a callable's own code names."""
    functions = [loss, *(getattr(type(loss), name, None) for name in ("forward", "__call__"))]
    found = (f.__globals__.get(name) for f in functions if isinstance(f, FunctionType) for name in f.__code__.co_names)
    return [value for value in found if isinstance(value, bool | int | float | str)]


def _modules_of(held: Any, depth: int) -> list[nn.Module]:
    """A module, or those of a callable: bound, in its closure, among its attributes, or global and named in it."""
    if isinstance(held, nn.Module) or depth == 3:
        return [held] if isinstance(held, nn.Module) else []
    inside: list[Any] = []
    if isinstance(held, MethodType):
        inside = [held.__self__, held.__func__]
    elif isinstance(held, functools.partial):
        inside = [held.func, *held.args, *held.keywords.values()]
    elif isinstance(held, FunctionType):
        cells = map(_content, held.__closure__ or ())
        inside = [*cells, *(held.__globals__.get(name) for name in held.__code__.co_names)]
    elif depth == 0:
        inside = [*getattr(held, "__dict__", {}).values(), type(held).__call__]
    return [m for value in inside for m in _modules_of(value, depth + 1)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def get_loss(loss: str | Loss | Callable[[Any, Any], Tensor]) -> Loss:
    """A loss by name (the keys of ``KNOWN``), a :class:`Loss`, or any callable(outputs, targets) -> mean loss.

    torch's own losses are recognised, as functions, modules or ``functools.partial`` of the functions: they get their
    closed forms and are put together by their own weights.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in KNOWN:
            raise ValueError(f"unknown loss {loss!r}; use one of {sorted(KNOWN)} or a callable(outputs, targets)")
        return KNOWN[loss]()
    if not callable(loss):
        raise ValueError(f"a loss is a name or a callable(outputs, targets), got {loss!r}")
    return _recognised(loss) or _of_torch(loss) or Loss(loss)


def _recognised(loss: Callable[[Any, Any], Tensor]) -> Loss | None:
    if isinstance(loss, nn.Module):
        options = _MODULES.get(type(loss))
        if options is None or loss._forward_hooks or loss._forward_pre_hooks:
            return None
        kind, names = options
        return kind(**{name: getattr(loss, name) for name in (*names, "reduction")})
    given: Any = loss
    keywords: Mapping[str, Any] = {}
    if isinstance(given, functools.partial) and not given.args:
        given, keywords = given.func, given.keywords
    for function, (kind, names) in _FUNCTIONS.items():
        if given is function and set(keywords) <= {*names, "reduction"}:
            return kind(**keywords)
    return None


def _of_torch(loss: Callable[[Any, Any], Tensor]) -> Loss | None:
    """A loss of torch's, or a user's module derived from one, whose reduction says how batches are put together."""
    if isinstance(loss, nn.modules.loss._Loss):
        name = type(loss).__name__
        if type(loss).__module__ == nn.modules.loss.__name__:
            return TorchLoss(loss, loss.reduction, name in _OVER_ENTRIES)
        return TorchLoss(loss, "sum", False) if loss.reduction == "sum" else None
    given: Any = loss
    function, keywords = (given.func, given.keywords) if isinstance(loss, functools.partial) else (given, {})
    name = getattr(function, "__name__", "")
    own = getattr(F, name, None) is function and (name.endswith("_loss") or name in _OVER_ENTRIES)
    if not own or not {"size_average", "reduce"}.isdisjoint(keywords):
        return None
    return TorchLoss(loss, keywords.get("reduction", "mean"), name in _OVER_ENTRIES)


_PLAIN_OPTIONS = ("ignore_index", "label_smoothing", "reduction")

_OVER_ENTRIES = {
    *("L1Loss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss", "GaussianNLLLoss", "KLDivLoss", "BCELoss", "MSELoss"),
    *("SoftMarginLoss", "HingeEmbeddingLoss", "BCEWithLogitsLoss"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss", "kl_div", "binary_cross_entropy", "mse_loss"),
    *("soft_margin_loss", "hinge_embedding_loss", "binary_cross_entropy_with_logits"),
}
"""torch's losses of which "mean" is the mean over the targets' entries, as modules and as functions."""

_OPTIONS: dict[type[KnownLoss], tuple[str, ...]] = {
    CrossEntropy: ("weight", "ignore_index", "label_smoothing"),
    MeanSquaredError: (),
    BinaryCrossEntropy: ("weight", "pos_weight"),
    NegativeLogLikelihood: ("weight", "ignore_index"),
}
_FUNCTIONS: dict[Callable[..., Tensor], tuple[type[KnownLoss], tuple[str, ...]]] = {
    getattr(F, kind.name): (kind, names) for kind, names in _OPTIONS.items()
}
_MODULES: dict[type[nn.Module], tuple[type[KnownLoss], tuple[str, ...]]] = {
    module: (kind, _OPTIONS[kind])
    for module, kind in (
        (nn.CrossEntropyLoss, CrossEntropy),
        (nn.MSELoss, MeanSquaredError),
        (nn.BCEWithLogitsLoss, BinaryCrossEntropy),
        (nn.NLLLoss, NegativeLogLikelihood),
    )
}


def _like(weight: Tensor | None, z: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(z.device, z.dtype)


def _tensor(targets: Any, name: str) -> Tensor:
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name} needs one tensor of targets, got a {type(targets).__name__}")
    return targets


def _same_shape(name: str, z: Tensor, targets: Tensor) -> Tensor:
    if z.shape != targets.shape:  # broadcasting (N, 1) against (N,) would be wrong without a word
        raise ValueError(f"{name} needs targets of shape {tuple(z.shape)}, got {tuple(targets.shape)}")
    return z
