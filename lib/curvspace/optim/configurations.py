"""Methods of the papers, and ours, as settings of :class:`~curvspace.optim.subspace_newton.SubspaceNewton`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from curvspace.losses import Loss
from curvspace.optim.base import require, require_count, require_flag
from curvspace.optim.bases import Basis, ClassGradients, Joint, PastUpdates
from curvspace.optim.damping import AdaptiveDamping
from curvspace.optim.drop import Drop
from curvspace.optim.eigenbases import TopEigenvectors
from curvspace.optim.inside import DiagonalNewton, RayleighRitzNewton, Scale
from curvspace.optim.outside import Adam, GradientDescent, Outside
from curvspace.optim.subspace_newton import SubspaceNewton

LossLike = str | Loss | Callable[[Tensor, Tensor], Tensor]
MomentumOn = Literal["step", "cospace"]
Cospace = Literal["sgd", "adam"]


def outside_step(cospace: Cospace, lr: float, momentum: float) -> Outside:
    require(cospace in ("sgd", "adam"), "cospace", cospace, '"sgd" or "adam"')
    return Adam(lr, (momentum, 0.999)) if cospace == "adam" else GradientDescent(lr, momentum)


def class_gradient_newton(
    model: nn.Module,
    num_classes: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    gamma: float = 0.9,
    *,
    momentum_on: MomentumOn = "step",
    dampening: float | None = None,
    initial: Literal["until-seen", "averaged", "averaged-corrected"] = "averaged",
    batch_norm: Literal["batch", "running"] | None = None,
    algorithm: Literal["auto", "split", "vjp"] = "auto",
    orthonormal: bool | Literal["qr", "symmetric"] = "qr",
    sequential: bool = False,
    reduction: Literal["mean", "class-sum", "batch-sum"] = "mean",
    estimate: Literal["basis", "gauss-newton", "hessian"] = "basis",
    damping: float = 0.0,
    floor: float = 0.0,
    trust_radius: float | None = None,
    refresh_every: int = 1,
    fraction: float = 1.0,
    scale: float | Literal["lr"] = 1.0,
    loss: LossLike = "cross_entropy",
) -> SubspaceNewton:
    r"""Paper A: Newton's method in the class-gradient subspace, eq. 15 to 17.

    .. math:: d = \eta g + \sum_k (1/\hat\lambda_k - \eta)(v_k^\top g)\,v_k, \qquad
              b \leftarrow \mu b + (1-\tau)\,d, \qquad \theta \leftarrow \theta - b

    What the paper leaves open is an option; the defaults are the reading that meets most of what the paper says of its
    method. With ``dampening=0.0, initial="until-seen", orthonormal=False`` it is the formulas as printed under
    heavy-ball momentum, which diverge in a few steps.

    Momentum: ``dampening`` is :math:`\tau`, 0 for the heavy ball, None for :math:`\tau=\mu`, a running average;
    ``momentum_on``, ``refresh_every``: see ``SubspaceNewton``. The curvature: ``initial`` (what :math:`\lambda(0)=1`
    does), ``estimate``, ``damping``, ``floor``, ``trust_radius``, ``fraction`` and ``scale`` (``"lr"``:
    :math:`\eta/\hat\lambda_k` in place of :math:`1/\hat\lambda_k`) are those of
    :class:`~curvspace.optim.inside.DiagonalNewton`. How the span is taken out: ``orthonormal``, ``sequential``, and
    ``reduction``, ``batch_norm``, ``algorithm`` are those of :class:`~curvspace.optim.bases.ClassGradients`.
    With ``orthonormal=True`` eq. 12 no longer estimates the curvature along the basis: give ``estimate`` too.
    """
    return SubspaceNewton(
        model,
        basis=ClassGradients(gamma, orthonormal, num_classes, batch_norm, algorithm, sequential, reduction),
        inside=DiagonalNewton(gamma, initial, estimate, damping, floor, trust_radius, fraction, scale),
        outside=GradientDescent(lr, momentum, dampening),
        loss=loss,
        momentum_on=momentum_on,
        refresh_every=refresh_every,
    )


def rayleigh_ritz_newton(
    model: nn.Module,
    num_classes: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    damping: float | Literal["adaptive"] = 10.0,
    *,
    scale: float = 0.3,
    gamma: float = 0.9,
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton",
    curvature_gamma: float = 0.0,
    fraction: float = 0.25,
    refresh_every: int = 10,
    past_updates: int = 0,
    cospace: Cospace = "sgd",
    momentum_on: MomentumOn = "cospace",
    batch_norm: Literal["batch", "running"] | None = "running",
    algorithm: Literal["auto", "split", "vjp"] = "auto",
    trust_radius: float | None = None,
    loss: LossLike = "cross_entropy",
) -> SubspaceNewton:
    r"""Ours: the class-gradient span with the true curvature restricted to it.

    .. math:: d = \alpha\,Q\,(Q^\top G Q + \delta I)^{-1} Q^\top g + \eta\,(\text{momentum of } (I - QQ^\top) g)

    ``scale`` is :math:`\alpha`; ``fraction`` the share of the minibatch on which G is measured;
    ``past_updates`` adds so many past steps to the span; ``cospace="adam"`` puts Adam in the orthogonal complement
    (``momentum`` is then its :math:`\beta_1`); ``damping="adaptive"`` follows the Levenberg-Marquardt rule. The
    defaults are those of the tournament (A-X2): less damping lets through the noise of small minibatches.
    """
    require_count("past_updates", past_updates, 0)
    require(not isinstance(damping, str) or damping == "adaptive", "damping", damping, 'a number or "adaptive"')
    basis: Basis = ClassGradients(gamma, True, num_classes, batch_norm, algorithm)
    if past_updates:
        basis = Joint([basis, PastUpdates(past_updates)])
    rule = AdaptiveDamping() if isinstance(damping, str) else damping
    return SubspaceNewton(
        model,
        basis=basis,
        inside=RayleighRitzNewton(rule, scale, curvature, fraction, curvature_gamma, trust_radius),
        outside=outside_step(cospace, lr, momentum),
        loss=loss,
        momentum_on=momentum_on,
        refresh_every=refresh_every,
    )


def low_rank_newton(
    model: nn.Module,
    k: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    refresh_every: int = 20,
    *,
    damping: float = 0.0,
    scale: float = 1.0,
    curvature: Literal["hessian", "gauss-newton", "ggn"] = "hessian",
    cospace: bool = True,
    tol: float = 0.05,
    max_products: int | None = None,
    fraction: float = 1.0,
    trust_radius: float | None = None,
    loss: LossLike = "cross_entropy",
) -> SubspaceNewton:
    r"""Paper B, eq. 11: :math:`\theta \leftarrow \theta - H_{top}^{-1} g_{top}` in the top-k eigenspace.

    With ``cospace`` the rest of the gradient goes to gradient descent with momentum, else nowhere (eq. 11 alone).
    Each eigenvalue enters by its magnitude. ``damping=0`` and ``scale=1`` are eq. 11.
    """
    require_flag("cospace", cospace)
    return SubspaceNewton(
        model,
        basis=TopEigenvectors(k, curvature, refresh_every, tol, max_products, fraction),
        inside=DiagonalNewton(0.0, damping=damping, trust_radius=trust_radius, scale=scale),
        outside=GradientDescent(lr, momentum) if cospace else Drop(lr),
        loss=loss,
    )


def dominant_sgd(
    model: nn.Module,
    k: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    refresh_every: int = 20,
    *,
    loss: LossLike = "cross_entropy",
    **options: Any,
) -> SubspaceNewton:
    r"""Gradient descent in the top-k eigenspace alone: :math:`\theta \leftarrow \theta - \eta\,QQ^\top g`.

    ``options`` go to :class:`~curvspace.optim.eigenbases.TopEigenvectors`.
    """
    basis = TopEigenvectors(k, refresh_every=refresh_every, **options)
    return SubspaceNewton(model, basis, Scale(), Drop(lr, momentum), loss, momentum_on="step")


def bulk_sgd(
    model: nn.Module,
    k: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    refresh_every: int = 20,
    *,
    span: Literal["eigenvectors", "class-gradients"] = "eigenvectors",
    cospace: Cospace = "sgd",
    loss: LossLike = "cross_entropy",
    **options: Any,
) -> SubspaceNewton:
    r"""Gradient descent outside a sharp subspace: :math:`\theta \leftarrow \theta - \eta\,(I - QQ^\top)\,g`.

    Q spans the top-k eigenvectors of the Hessian or, for k classes and much cheaper, the class gradients; ``options``
    go to :class:`~curvspace.optim.eigenbases.TopEigenvectors` or :class:`~curvspace.optim.bases.ClassGradients`.
    ``cospace="adam"`` puts Adam in the place of gradient descent.
    """
    require(span in ("eigenvectors", "class-gradients"), "span", span, '"eigenvectors" or "class-gradients"')
    basis: Basis
    if span == "class-gradients":
        basis = ClassGradients(orthonormal=True, num_classes=k, **options)
    else:
        basis = TopEigenvectors(k, refresh_every=refresh_every, **options)
    return SubspaceNewton(model, basis, Drop(), outside_step(cospace, lr, momentum), loss, refresh_every=refresh_every)
