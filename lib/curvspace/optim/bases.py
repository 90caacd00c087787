r"""Where the span comes from: class gradients, past updates, random directions, or several of them together.

Eigenvectors are in :mod:`curvspace.optim.eigenbases`. A basis is asked once a step to ``observe`` the minibatch: it
returns loss and gradient (which it may get in the same pass) and, when it is told to refresh, moves its span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from curvspace.curvature.class_batches import number_of_classes
from curvspace.curvature.class_gradients import class_curvatures
from curvspace.curvature.frozen import BatchNorm
from curvspace.errors import refuse_old
from curvspace.functional import trainable_parameters
from curvspace.optim.base import require, require_count, require_flag, require_numbers
from curvspace.optim.mean_directions import joint_span, mean_span, transposed_groups
from curvspace.optim.minibatch import Algorithm, Minibatch
from curvspace.optim.span import (
    Span,
    identity_span,
    ordered_span,
    orthonormal_span,
    principal_span,
    sequential_span,
    symmetric_span,
    unit_span,
)
from curvspace.seeds import derived_seed
from curvspace.subspace import orthonormal_basis

Orthonormal = bool | Literal["qr", "symmetric"]
Reduction = Literal["mean", "class-sum", "batch-sum"]


@dataclass(frozen=True)
class Observation:
    """What a basis saw of a minibatch.

    loss, gradient (P,): of the minibatch. curvatures (k,): the basis's own estimate of the curvature along each of
    its directions, from this minibatch; None unless it has one and was refreshed. valid (k,): which of these mean
    anything (an absent class gives none).
    """

    loss: Tensor
    gradient: Tensor
    curvatures: Tensor | None = None
    valid: Tensor | None = None


class Basis:
    """Base of the bases. ``span`` is None until the first refresh; ``state`` holds all that a reload needs."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.span: Span | None = None

    def made_of(self) -> list[Any]:
        """What another basis must have in common to go on from a saved state."""
        return [type(self).__name__, getattr(self, "k", None), getattr(self, "window", None)]

    def observe(self, batch: Minibatch, refresh: bool) -> Observation:
        """Loss and gradient of the minibatch; with ``refresh`` the span moves too."""
        loss, gradient = batch.gradient()
        if refresh:
            self._refresh(batch, gradient)
        return Observation(loss, gradient)

    def record(self, update: Tensor) -> None:
        """Told of each step (P,) that was subtracted from the parameters."""

    def restore(self) -> None:
        """Form the span again from a loaded ``state``."""

    def load(self, state: dict[str, Any]) -> None:
        """Be as when ``state`` was saved, without a span where it was saved before the first refresh."""
        self.state, self.span = state, None
        self.restore()

    def _refresh(self, batch: Minibatch, gradient: Tensor) -> None:
        raise NotImplementedError


class ClassGradients(Basis):
    r"""The span of the class gradients' running averages (paper A, eq. 8 and 16).

    .. math:: \hat c_k = \frac{1-\gamma}{1-\gamma^{t_k}} \sum_{i\le t_k} \gamma^{t_k-i} c_k^{(i)}, \qquad
              v_k = \hat c_k/|\hat c_k|, \qquad c_k = \frac{1}{|B_k|}\sum_{\mu\in B_k} \nabla z_k^\mu,

    where :math:`t_k` counts the minibatches that held class k: a class that is absent moves neither its average nor
    its counter. Along :math:`v_k` it estimates the curvature by eq. 12
    (:func:`~curvspace.curvature.class_gradients.class_curvatures`), which is of the mean cross-entropy without weights,
    whatever the loss is.

    Parameters
    ----------
    gamma
        Decay of the average, in [0, 1).
    orthonormal
        False: the unit vectors :math:`v_k` as they are (the paper). ``"qr"``: orthonormalised in the order of the
        classes, ``"symmetric"``: by :math:`V^\top(VV^\top)^{-1/2}` (:func:`~curvspace.optim.span.ordered_span`,
        :func:`~curvspace.optim.span.symmetric_span`); the estimate of eq. 12 goes with the vector of its class.
        True: any orthonormal basis of the span, whose vectors belong to no class, so that eq. 12 says nothing.
    num_classes
        C; None: the number of the model's outputs.
    sequential
        Take the :math:`v_k` out of the gradient one after the other, each from what the last one left
        (:func:`~curvspace.optim.span.sequential_span`), in place of all at once as in eq. 14 and 15. Without effect
        where they are orthonormal.
    reduction
        ``"mean"``: as printed. ``"class-sum"``: :math:`c_k` is the sum over :math:`B_k`, in eq. 12 too.
        ``"batch-sum"``: eq. 12 is the sum over B.
    batch_norm
        Through which statistics of batch normalisation the class gradients go: ``"batch"``, ``"running"``, or
        ``None``, those of the module's present mode. Loss, gradient and curvature always go through the present mode's,
        so that with ``"running"`` in training mode the span is that of another function: early in a run it held an
        eighth of the gradient or less, where that of the batch's statistics held about half or more (see the docs'
        page on class gradients).
    algorithm
        ``"split"`` by class, about one backward pass in all, which batch statistics forbid; ``"vjp"``, one backward
        pass per class; ``"auto"``, the split where it is exact.
    """

    _RENAMED: ClassVar = {
        "method=frozen": 'batch_norm="running"',
        "method": "batch_norm and algorithm",
        "method=vjp": 'algorithm="vjp"',
        "batch_norm=auto": "batch_norm=None",
        "batch_norm=frozen": 'batch_norm="running"',
        "batch_norm=vjp": 'algorithm="vjp"',
    }

    def __init__(
        self,
        gamma: float = 0.9,
        orthonormal: Orthonormal = False,
        num_classes: int | None = None,
        batch_norm: BatchNorm = None,
        algorithm: Algorithm = "auto",
        sequential: bool = False,
        reduction: Reduction = "mean",
        **old: object,
    ):
        super().__init__()
        refuse_old(self._RENAMED, batch_norm=batch_norm, **old)
        if old:
            raise TypeError(f"ClassGradients has no option {next(iter(old))!r}")
        require_numbers(gamma=gamma)
        require(0 <= gamma < 1, "gamma", gamma, "in [0, 1)")
        require_count("num_classes", num_classes, optional=True)
        require(
            orthonormal in (False, True, "qr", "symmetric"), "orthonormal", orthonormal, '"qr", "symmetric" or bool'
        )
        require_flag("sequential", sequential)
        require(reduction in get_args(Reduction), "reduction", reduction, f"one of {', '.join(get_args(Reduction))}")
        require(batch_norm in ("batch", "running", None), "batch_norm", batch_norm, '"batch", "running" or None')
        require(algorithm in ("auto", "split", "vjp"), "algorithm", algorithm, '"auto", "split" or "vjp"')
        self.gamma, self.orthonormal, self.num_classes = gamma, orthonormal, num_classes
        self.batch_norm, self.algorithm = batch_norm, algorithm
        self.sequential, self.reduction = sequential, reduction

    def observe(self, batch: Minibatch, refresh: bool) -> Observation:
        if not refresh:
            return super().observe(batch, refresh=False)
        if self.num_classes is None:
            self.num_classes = number_of_classes(batch.model, batch.inputs)
        found = batch.classes(self.num_classes, self.batch_norm, self.algorithm)
        if self.reduction == "class-sum":
            total = found.class_gradients * found.counts[:, None]
            found = replace(found, class_gradients=total)
        self.average(found.class_gradients, found.counts)
        own = len(batch.targets) * class_curvatures(found.class_gradients, found.probabilities, batch.targets)
        (total,) = batch.ranks.total([own])
        curvatures = total / found.counts.sum()
        if self.reduction == "batch-sum":
            curvatures = total
        # The estimates belong to classes; the vectors of just any orthonormal basis do not.
        known = None if self.orthonormal is True else curvatures
        return Observation(found.loss, found.gradient, known, found.counts > 0)

    def average(self, c: Tensor, counts: Tensor) -> None:
        """Take a minibatch's class gradients (C, P) and counts (C,) in: eq. 16, and the span anew.

        Without its factor :math:`1/(1-\\gamma^t)`, which the normalisation to unit length cancels.
        """
        if not self.state:
            self.state = {"average": torch.zeros_like(c), "times": torch.zeros_like(counts)}
        present = counts > 0
        weight = (1 - self.gamma) * present.to(c.dtype)
        self.state["average"].mul_(1 - weight[:, None]).addcmul_(weight[:, None], c)
        self.state["times"] += present
        self.restore()

    def averages(self) -> Tensor:
        r""":math:`\hat c_k` of eq. 16 with its bias correction, (C, P); zero for classes never seen."""
        corrected = 1 - self.gamma ** self.state["times"].to(self.state["average"].dtype)
        return self.state["average"] / corrected.clamp_min(torch.finfo(corrected.dtype).tiny)[:, None]

    def restore(self) -> None:
        if self.state:
            rows = self.state["average"]
            if self.orthonormal:
                forms = {True: lambda r: orthonormal_span([r]), "qr": ordered_span, "symmetric": symmetric_span}
                self.span = forms[self.orthonormal](rows)
            else:
                self.span = sequential_span(rows) if self.sequential else unit_span(rows)


class PastUpdates(Basis):
    """The span of the last k steps (orthonormal): the directions in which momentum would go on."""

    def __init__(self, k: int = 1):
        super().__init__()
        require_count("k", k)
        self.k = k

    def record(self, update: Tensor) -> None:
        if not self.state:
            self.state = {"updates": update.new_zeros(self.k, len(update)), "recorded": 0}
        self.state["updates"][self.state["recorded"] % self.k] = update
        self.state["recorded"] += 1

    def _refresh(self, batch: Minibatch, gradient: Tensor) -> None:
        if self.state:
            self.state["spanning"] = self.state["updates"].clone()  # the ring is written again before the next refresh
            self.restore()

    def restore(self) -> None:
        if "spanning" in self.state:
            self.span = orthonormal_span([self.state["spanning"]])


class PrincipalUpdates(Basis):
    r"""The k principal directions of the last ``window`` steps :math:`u_i`: where steps vary most.

    .. math:: \sum_i (u_i - \bar u)(u_i - \bar u)^\top Q = Q \Lambda, \qquad
              \bar u \text{ their mean, or 0 where not } \texttt{centred}

    They are orthonormal, and come from the Gram matrix of the steps.
    """

    def __init__(self, k: int, window: int = 20, centred: bool = True):
        super().__init__()
        require_count("k", k)
        require(window > k, "window", window, f"more than k = {k} steps")
        require_flag("centred", centred)
        self.k, self.window, self.centred = k, window, centred
        self._past = PastUpdates(window)

    @property  # type: ignore[override]
    def state(self) -> dict[str, Any]:
        return self._past.state

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        if hasattr(self, "_past"):
            self._past.state = value

    def record(self, update: Tensor) -> None:
        self._past.record(update)

    def _refresh(self, batch: Minibatch, gradient: Tensor) -> None:
        if self.state and self.state["recorded"] > self.k:
            self.state["spanning"] = self.state["updates"].clone()
            self.state["spanned"] = min(self.state["recorded"], self.window)
            self.restore()

    def restore(self) -> None:
        if "spanning" in self.state:
            rows = self.state["spanning"][: self.state["spanned"]]
            self.span = principal_span(rows, self.k, self.centred)


class MeanDirections(Basis):
    r"""The mean direction of each output unit's weights over its inputs: what gradient centralisation takes out.

    For each weight tensor of at least two dimensions and each of its output units, the constant unit vector over the
    unit's entries; :math:`QQ^\top g` is each unit's mean gradient, so that :math:`g - QQ^\top g` is Yong et al.'s
    :math:`\Phi_{GC}(g)` (arXiv 2004.01461, eq. 1 and 2). In closed form: no (P, k) matrix is formed, so that rules
    which need one (``RayleighRitzNewton``, ``estimate=`` of ``DiagonalNewton``) do not go with it.
    """

    def _refresh(self, batch: Minibatch, gradient: Tensor) -> None:
        self.lay_out(batch.model, trainable_parameters(batch.model).values())

    def lay_out(self, model: nn.Module, parameters: Iterable[Tensor]) -> None:
        """Take the mean directions of these parameters of the model, in their order."""
        if self.span is None:
            groups, chosen = transposed_groups(model), list(parameters)
            self.state = {
                "shapes": [list(p.shape) for p in chosen],
                "transposed": [groups.get(p, 0) for p in chosen],
            }
            self.restore()

    def restore(self) -> None:
        if self.state:
            self.span = mean_span(self.state["shapes"], self.state.get("transposed"))


class RandomDirections(Basis):
    """k random orthonormal directions: the null against which a basis must show its worth.

    ``redraw``: new ones at every refresh, else the same throughout. The draws are a function of ``seed`` and the
    number of the refresh, and those of two seeds have nothing in common.
    """

    def __init__(self, k: int, seed: int = 0, redraw: bool = False):
        super().__init__()
        require_count("k", k)
        self.k, self.seed, self.redraw = k, seed, redraw

    def _refresh(self, batch: Minibatch, gradient: Tensor) -> None:
        draws = self.state.get("draws", 0)
        if draws and not self.redraw:
            return
        require(self.k <= len(gradient), "k", self.k, f"at most the number of parameters, {len(gradient)}")
        generator = torch.Generator(device=gradient.device).manual_seed(derived_seed(self.seed, "directions", draws))
        normal = torch.randn((len(gradient), self.k), generator=generator, dtype=gradient.dtype, device=gradient.device)
        rows = orthonormal_basis(torch.linalg.qr(normal)[0]).T
        self.state = {"draws": draws + 1, "rows": rows.contiguous()}
        self.restore()

    def restore(self) -> None:
        if self.state:
            self.span = identity_span(self.state["rows"])


class Joint(Basis):
    """The orthonormal sum of several bases' spans: ``Joint([ClassGradients(), PastUpdates(1)])``.

    The first basis gives loss and gradient; class gradients, whose pass yields them too, must therefore come first.
    """

    def __init__(self, bases: Sequence[Basis]):
        super().__init__()
        require(len(bases) >= 1, "bases", bases, "at least one basis")
        late = [b for b in bases[1:] if isinstance(b, ClassGradients)]
        require(not late, "bases", bases, "a sequence in which class gradients come first")
        self.bases = list(bases)

    @property  # type: ignore[override]
    def state(self) -> dict[str, Any]:
        return {str(i): basis.state for i, basis in enumerate(self.bases)}

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        for i, basis in enumerate(getattr(self, "bases", [])):
            basis.state = value[str(i)]

    def observe(self, batch: Minibatch, refresh: bool) -> Observation:
        first = self.bases[0].observe(batch, refresh)
        if refresh:
            for basis in self.bases[1:]:
                basis._refresh(batch, first.gradient)
            self._join()
        return Observation(first.loss, first.gradient)

    def record(self, update: Tensor) -> None:
        for basis in self.bases:
            basis.record(update)

    def made_of(self) -> list[Any]:
        return [type(self).__name__, *(basis.made_of() for basis in self.bases)]

    def load(self, state: dict[str, Any]) -> None:
        for i, basis in enumerate(self.bases):
            basis.load(state[str(i)])
        self._join()

    def restore(self) -> None:
        for basis in self.bases:
            basis.restore()
        self._join()

    def _join(self) -> None:
        spans = [basis.span for basis in self.bases if basis.span is not None]
        self.span = joint_span(spans) if spans else None
