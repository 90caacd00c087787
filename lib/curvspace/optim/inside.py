r"""Rules for the step within the span: coefficients s of the step Q s from the coordinates :math:`Q^\top g`."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from curvspace.errors import refuse_old
from curvspace.inner import norm
from curvspace.optim.base import require, require_numbers
from curvspace.optim.bases import Observation
from curvspace.optim.damping import AdaptiveDamping
from curvspace.optim.minibatch import CURVATURES, Minibatch
from curvspace.optim.span import Span

Initial = Literal["until-seen", "averaged", "averaged-corrected"]
INITIAL = get_args(Initial)


class Inside:
    """Base of the rules. ``trust_radius`` bounds the length of the step in the span (None: unbounded)."""

    trust_radius: float | None = None

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def refresh(self, span: Span, batch: Minibatch, observed: Observation) -> None:
        """The basis has moved: measure its curvature anew."""

    def leave(self, span: Span) -> None:
        """The basis is about to move, maybe in place: what was gathered in coordinates will mean something else."""

    def enter(self, span: Span) -> None:
        """The basis has moved."""

    def coefficients(self, coordinates: Tensor, group: dict[str, Any]) -> Tensor:
        r"""Coefficients s (k,) of the step that is subtracted, from :math:`Q^\top g` (k,)."""
        raise NotImplementedError

    def due(self) -> bool:
        """Whether this step's actual reduction of the loss is to be measured for :meth:`judge`."""
        return False

    def judge(self, coordinates: Tensor, coefficients: Tensor, actual: Tensor) -> None:
        """Told of the reduction of the minibatch loss by the step in the span alone."""

    def log(self) -> dict[str, Any]:
        return {}


def scheduled(group: dict[str, Any]) -> float:
    r"""The present factor :math:`\eta/\eta_0` of a learning-rate schedule, which a Newton step shares; 1 without one.

    :math:`\eta_0` is the rate that the optimiser was built with: schedulers write values of their own into
    ``initial_lr``, or none. A step with a length of its own would otherwise keep the minibatches' noise where the
    schedule is to end it.
    """
    built = group.get("built_lr")
    return group["lr"] / built if built else 1.0


class DiagonalNewton(Inside):
    r"""Newton's method along each basis vector alone: :math:`s_k = v_k^\top g/\hat\lambda_k` (paper A, eq. 13 and 15).

    :math:`\hat\lambda_k` is the root mean square of the curvature estimates (paper A, eq. 17), each class with its own
    counter :math:`t_k` of the minibatches that held it:

    .. math:: \hat\lambda_k = \sqrt{\frac{1-\gamma}{1-\gamma^{t_k}} \sum_{i\le t_k}\gamma^{t_k-i}(\lambda_k^{(i)})^2}

    With eigenvectors, whose estimates are the eigenvalues, and ``gamma=0`` it is paper B, eq. 11.

    Parameters
    ----------
    gamma
        Decay of the average, in [0, 1), over refreshes of the k-th vector: 0 for bases whose vectors do not keep their
        meaning (any orthonormal basis of a span, past updates).
    initial
        What :math:`\lambda(0)=1` does. ``"until-seen"``: it stands until the class is first seen, and with the bias
        correction of eq. 17 has no weight afterwards. ``"averaged"``: it enters the average, which is then not
        corrected: :math:`\hat\lambda^2 \leftarrow \gamma\hat\lambda^2 + (1-\gamma)\lambda^2`, from 1.
        ``"averaged-corrected"``: the same average divided by :math:`1-\gamma^{t_k}`, whose start at 1 then weighs
        :math:`\gamma^{t_k}/(1-\gamma^{t_k})`: more than 1 at first.
    estimate
        ``"basis"``: the basis's own estimate (paper A, eq. 12; the eigenvalue). ``"gauss-newton"`` or ``"hessian"``:
        the true :math:`v_k^\top A v_k` on the share ``fraction`` of the minibatch.
    damping, floor
        :math:`1/(\max(\hat\lambda_k, \text{floor}) + \delta)`; both 0 as printed.
    trust_radius
        Longest step in the span; None as printed.
    scale
        Factor of the step, times that of a schedule of the learning rate; 1 as printed. ``"lr"``: the learning rate,
        :math:`s_k = \eta\,v_k^\top g/\hat\lambda_k`.
    """

    def __init__(
        self,
        gamma: float = 0.9,
        initial: Initial = "until-seen",
        estimate: Literal["basis", "gauss-newton", "hessian"] = "basis",
        damping: float = 0.0,
        floor: float = 0.0,
        trust_radius: float | None = None,
        fraction: float = 1.0,
        scale: float | Literal["lr"] = 1.0,
    ):
        super().__init__()
        refuse_old({"initial=until seen": '"until-seen"', "initial=weighted": '"averaged"'}, initial=initial)
        require_numbers(gamma=gamma, damping=damping, floor=floor, fraction=fraction)
        require(0 <= gamma < 1, "gamma", gamma, "in [0, 1)")
        require(scale == "lr" if isinstance(scale, str) else scale > 0, "scale", scale, 'positive, or "lr"')
        require(initial in INITIAL, "initial", initial, f"one of {', '.join(INITIAL)}")
        allowed = ("basis", *CURVATURES)
        require(estimate in allowed, "estimate", estimate, f"one of {', '.join(allowed)}")
        require(damping >= 0, "damping", damping, "at least 0")
        require(floor >= 0, "floor", floor, "at least 0")
        require(trust_radius is None or trust_radius > 0, "trust_radius", trust_radius, "positive")
        require(0 < fraction <= 1, "fraction", fraction, "in (0, 1]")
        self.gamma, self.initial, self.estimate = gamma, initial, estimate
        self.damping, self.floor, self.trust_radius = damping, floor, trust_radius
        self.fraction, self.scale = fraction, scale

    def refresh(self, span: Span, batch: Minibatch, observed: Observation) -> None:
        curvatures, valid = observed.curvatures, observed.valid
        if self.estimate != "basis":
            reduced = batch.part(self.fraction).reduced_curvature(span.directions(), self.estimate)
            curvatures = span.quadratic(reduced).diagonal()
            valid = span.mix.any(dim=0)
        if curvatures is None:
            raise ValueError(
                "this basis has no estimate of the curvature along its vectors; use DiagonalNewton with "
                'estimate="gauss-newton" or RayleighRitzNewton'
            )
        self._average(curvatures, torch.ones_like(curvatures, dtype=torch.bool) if valid is None else valid)

    def _average(self, curvatures: Tensor, valid: Tensor) -> None:
        if not self.state:
            start = torch.full_like(curvatures, 0.0 if self.initial == "until-seen" else 1.0)
            self.state = {"squares": start, "times": torch.zeros_like(valid, dtype=torch.long)}
        weight = (1 - self.gamma) * valid.to(curvatures.dtype)
        self.state["squares"].mul_(1 - weight).add_(weight * curvatures.square())
        self.state["times"] += valid

    def curvatures(self) -> Tensor:
        r""":math:`\hat\lambda` of eq. 17, (k,); 1 for a class never seen."""
        squares, times = self.state["squares"], self.state["times"]
        if self.initial == "averaged":
            return squares.sqrt()
        correction = 1 - self.gamma ** times.to(squares.dtype)
        return torch.where(times > 0, squares / correction, torch.ones_like(squares)).sqrt()

    def coefficients(self, coordinates: Tensor, group: dict[str, Any]) -> Tensor:
        curvatures = self.curvatures().clamp_min(self.floor) + self.damping
        # A direction without gradient takes no step, even where its curvature is zero too (0/0).
        step = torch.where(coordinates == 0, torch.zeros_like(coordinates), coordinates / curvatures)
        return (group["lr"] if self.scale == "lr" else self.scale * scheduled(group)) * step


class RayleighRitzNewton(Inside):
    r"""Newton's method with the span's own curvature: :math:`s = \alpha\,(Q^\top G Q + \delta I)^{-1} Q^\top g`.

    The (k, k) matrix comes from forward-mode products on a share of the minibatch; nothing of size P x P is formed.

    Parameters
    ----------
    damping
        :math:`\delta \ge 0`, or an :class:`~curvspace.optim.damping.AdaptiveDamping`.
    scale
        :math:`\alpha > 0`: 1 is the full Newton step, less of it averages the minibatches' noise. A schedule of the
        learning rate moves it too.
    curvature
        ``"gauss-newton"`` (positive semidefinite) or ``"hessian"``, which may be indefinite: see :class:`SaddleFree`.
    fraction
        Share of the minibatch that the curvature is measured on.
    gamma
        Decay of a running average over refreshes of the curvature between the basis's directions at unit length,
        corrected for its start at zero; 0: the last alone. For bases whose directions keep their meaning (class
        gradients).
    trust_radius
        Longest step in the span.
    """

    magnitude = False

    def __init__(
        self,
        damping: float | AdaptiveDamping = 0.1,
        scale: float = 1.0,
        curvature: Literal["gauss-newton", "hessian"] = "gauss-newton",
        fraction: float = 1.0,
        gamma: float = 0.0,
        trust_radius: float | None = None,
    ):
        super().__init__()
        require(isinstance(damping, AdaptiveDamping) or damping >= 0, "damping", damping, "at least 0, or adaptive")
        require_numbers(scale=scale, fraction=fraction, gamma=gamma)
        require(scale > 0, "scale", scale, "positive")
        require(curvature in CURVATURES, "curvature", curvature, f"one of {', '.join(CURVATURES)}")
        require(0 < fraction <= 1, "fraction", fraction, "in (0, 1]")
        require(0 <= gamma < 1, "gamma", gamma, "in [0, 1)")
        require(trust_radius is None or trust_radius > 0, "trust_radius", trust_radius, "positive")
        self.damping, self.scale, self.curvature, self.fraction = damping, scale, curvature, fraction
        self.gamma, self.trust_radius = gamma, trust_radius

    def refresh(self, span: Span, batch: Minibatch, observed: Observation) -> None:
        directions, mix = span.directions(), span.mix.double()
        reduced = batch.part(self.fraction).reduced_curvature(directions, self.curvature)
        if self.gamma > 0:
            lengths = norm(directions).double()
            reduced, mix = self._averaged(reduced, lengths), lengths[:, None] * mix
        small = mix.T @ reduced @ mix
        values, vectors = torch.linalg.eigh(small.nan_to_num())  # NaN: diverged; the gradient carries it on
        if self.curvature == "gauss-newton":
            values = values.clamp_min(0)
        self.state["values"] = values.to(span.mix.dtype)
        self.state["vectors"] = vectors.to(span.mix.dtype)

    def _averaged(self, reduced: Tensor, lengths: Tensor) -> Tensor:
        """The running mean between unit directions: a pair counts from where both are known (a class not yet seen)."""
        known = torch.outer(lengths, lengths) > 0
        unit = torch.where(known, reduced / torch.outer(lengths, lengths), 0.0)
        if "mean" in self.state and len(self.state["mean"]) != len(lengths):
            raise ValueError(
                f"the basis has {len(lengths)} directions, before it had {len(self.state['mean'])}: a mean over "
                "refreshes (gamma, curvature_gamma) is for a basis whose directions keep their meaning; use 0"
            )
        for name, value in (("mean", unit), ("weight", known.double())):
            self.state[name] = self.state.get(name, torch.zeros_like(value)).lerp(value, 1 - self.gamma)
        return torch.where(self.state["weight"] > 0, self.state["mean"] / self.state["weight"], 0.0)

    def coefficients(self, coordinates: Tensor, group: dict[str, Any]) -> Tensor:
        values, vectors = self.state["values"], self.state["vectors"]
        damping = self.damping.value(coordinates) if isinstance(self.damping, AdaptiveDamping) else self.damping
        along = vectors.T @ coordinates
        denominator = (values.abs() if self.magnitude else values) + damping
        along = torch.where(denominator == 0, torch.zeros_like(along), along / denominator)
        return self.scale * scheduled(group) * (vectors @ along)

    def due(self) -> bool:
        return isinstance(self.damping, AdaptiveDamping) and self.damping.due()

    def judge(self, coordinates: Tensor, coefficients: Tensor, actual: Tensor) -> None:
        r"""The quadratic model predicts :math:`(Q^\top g)^\top s - \frac12 s^\top Q^\top G Q s`."""
        along = self.state["vectors"].T @ coefficients
        predicted = coordinates @ coefficients - 0.5 * (self.state["values"] * along.square()).sum()
        if isinstance(self.damping, AdaptiveDamping):
            self.damping.judge(actual, predicted)

    def log(self) -> dict[str, Any]:
        if isinstance(self.damping, AdaptiveDamping):
            names = {"damping": "damping", "ratio": "reduction_ratio"}
            return {name: self.damping.state[key] for key, name in names.items() if key in self.damping.state}
        return {}


class SaddleFree(RayleighRitzNewton):
    r"""Newton's method with magnitudes: :math:`s = \alpha\,(|Q^\top H Q| + \delta I)^{-1} Q^\top g`.

    |A| takes the absolute value of each eigenvalue, so that the step descends along negative curvature too.
    """

    magnitude = True

    def __init__(
        self,
        damping: float | AdaptiveDamping = 0.1,
        scale: float = 1.0,
        curvature: Literal["gauss-newton", "hessian"] = "hessian",
        fraction: float = 1.0,
        gamma: float = 0.0,
        trust_radius: float | None = None,
    ):
        super().__init__(damping, scale, curvature, fraction, gamma, trust_radius)


class MomentumNewton(DiagonalNewton):
    r"""Newton's method on the momentum of the gradient in the span (FOSI, arXiv 2302.08484).

    .. math:: m \leftarrow \mu m + w\,QQ^\top g, \qquad s_k = \alpha\, q_k^\top m / |\lambda_k|

    with w = 1 (heavy ball) or, ``averaged``, :math:`1-\mu`. m is a vector of the whole space: what it holds outside a
    new span waits, decaying, for a later one. ``momentum=None``: :math:`\mu` is the param group's, its ``momentum`` or
    the first of its ``betas``, which schedulers move. The basis must be orthonormal.
    """

    def __init__(self, scale: float = 0.1, momentum: float | None = 0.9, averaged: bool = False):
        super().__init__(gamma=0.0, scale=scale)
        require(momentum is None or 0 <= momentum < 1, "momentum", momentum, "in [0, 1), or None")
        self.momentum, self.averaged = momentum, averaged

    def coefficients(self, coordinates: Tensor, group: dict[str, Any]) -> Tensor:
        momentum = self.momentum
        if momentum is None:
            momentum = group["betas"][0] if "betas" in group else group["momentum"]
        new = (1 - momentum) * coordinates if self.averaged else coordinates
        if "along" in self.state:
            new = momentum * self.state["along"] + new
        if "waiting" in self.state:
            self.state["waiting"] = momentum * self.state["waiting"]
        self.state["along"] = new
        return super().coefficients(new, group)

    def leave(self, span: Span) -> None:
        if "along" in self.state:
            self.state["waiting"] = span.combine(self.state.pop("along")) + self.state.get("waiting", 0)

    def enter(self, span: Span) -> None:
        if not span.orthonormal:
            raise ValueError('MomentumNewton needs an orthonormal basis, as ClassGradients(orthonormal="qr") is')
        if "waiting" in self.state:
            self.state["along"] = span.coordinates(self.state["waiting"])
            self.state["waiting"] = self.state["waiting"] - span.combine(self.state["along"])


class Scale(Inside):
    r"""A multiple of the gradient in the span: :math:`s = \alpha\, Q^\top g`.

    ``alpha=None``: ``relative`` times the learning rate.
    """

    def __init__(self, alpha: float | None = None, relative: float = 1.0):
        super().__init__()
        require_numbers(relative=relative)
        require(alpha is None or alpha >= 0, "alpha", alpha, "at least 0, or None")
        require(relative >= 0, "relative", relative, "at least 0")
        self.alpha, self.relative = alpha, relative

    def coefficients(self, coordinates: Tensor, group: dict[str, Any]) -> Tensor:
        return (self.relative * group["lr"] if self.alpha is None else self.alpha) * coordinates
