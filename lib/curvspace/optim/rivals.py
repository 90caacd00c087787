"""Methods of other papers that treat a small subspace apart, as settings of ``SubspaceNewton``."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from curvspace.optim.base import require, require_count
from curvspace.optim.bases import MeanDirections, PrincipalUpdates
from curvspace.optim.configurations import Cospace, LossLike, outside_step
from curvspace.optim.drop import Drop
from curvspace.optim.eigenbases import ExtremeEigenvectors, TopEigenvectors
from curvspace.optim.inside import MomentumNewton, Scale
from curvspace.optim.outside import GradientDescent, Rescaled
from curvspace.optim.subspace_newton import SubspaceNewton


def fosi(
    model: nn.Module,
    k: int = 10,
    lr: float = 0.1,
    momentum: float = 0.9,
    *,
    smallest: int = 0,
    alpha: float = 0.1,
    cospace: Cospace = "sgd",
    clip: float | None = None,
    refresh_every: int = 100,
    warmup: int | None = None,
    loss: LossLike = "cross_entropy",
    **options: Any,
) -> SubspaceNewton:
    r"""FOSI (Sivan, Gabel, Schuster: Hybrid first and second order optimization, arXiv 2302.08484, algorithm 2).

    .. math:: g_1 = VV^\top g, \quad m \leftarrow \mathrm{momentum}(m, g_1), \quad
              d = \alpha\,V|\Lambda|^{-1}V^\top m + c\,(I - VV^\top)\,\mathrm{base}(g - g_1)

    V are the eigenvectors of the k largest and the ``smallest`` (so many; their l) eigenvalues of H, the base rule is
    the heavy ball (m the sum :math:`\mu m + g_1`) or, ``cospace="adam"``, Adam (m the average
    :math:`\mu m + (1-\mu)g_1`). The base keeps its own, unprojected state; its step is projected.
    :math:`c = \min(|\lambda_1/\lambda_k|, \mathtt{clip})`, at least 1, lengthens the base's step to the curvature that
    is left to it; ``clip`` is 3 for the heavy ball and 1 for Adam unless given, as in the authors' code.

    ``refresh_every`` (their T) steps pass between estimates of the spectrum, ``warmup`` (their w; T unless given) is
    the number of the step, from 1, at which it is first estimated. ``options`` (``tol``, ``max_products``,
    ``fraction``) go to :class:`~curvspace.optim.eigenbases.TopEigenvectors`: the authors estimate with Lanczos on a
    fixed batch, here each end is followed from the last estimate, on the present minibatch.
    """
    clip = (1.0 if cospace == "adam" else 3.0) if clip is None else clip
    warmup = refresh_every if warmup is None else warmup
    require(clip >= 1, "clip", clip, "at least 1")
    require_count("warmup", warmup)
    basis = ExtremeEigenvectors(k, smallest, **options)
    factor = functools.partial(_spread, basis, clip)  # a copy of the optimiser has one on its own basis

    return SubspaceNewton(
        model,
        basis,
        MomentumNewton(alpha, momentum=None, averaged=cospace == "adam"),
        Rescaled(outside_step(cospace, lr, momentum), within=0.0, outside=factor),
        loss,
        refresh_every=refresh_every,
        first_refresh=warmup - 1,
    )


def nudged_sgd(
    model: nn.Module,
    k: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    *,
    factor: float = 0.01,
    refresh_every: int = 20,
    loss: LossLike = "cross_entropy",
    **options: Any,
) -> SubspaceNewton:
    r"""Nudged-SGD (Jastrzebski et al., arXiv 1807.05031, section 4): a smaller rate along the sharpest directions.

    .. math:: d = \eta\,(I - QQ^\top)\,g + \gamma\eta\,QQ^\top g

    Q are the k top eigenvectors of H and :math:`\gamma` is ``factor``. ``momentum`` acts on the whole step;
    ``options`` go to :class:`~curvspace.optim.eigenbases.TopEigenvectors`.
    """
    basis = TopEigenvectors(k, refresh_every=refresh_every, **options)
    return SubspaceNewton(model, basis, Scale(relative=factor), GradientDescent(lr, momentum), loss, momentum_on="step")


def bsfa(
    model: nn.Module,
    k: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    *,
    dominant: float = 1.0,
    bulk: float = 2.0,
    window: int = 50,
    centred: bool = True,
    cospace: Cospace = "sgd",
    refresh_every: int = 10,
    loss: LossLike = "cross_entropy",
) -> SubspaceNewton:
    r"""Past-update PCA with amplified bulk (BSFA: Bulk-Space-Filtration-Accelerator, arXiv 2510.25244).

    .. math:: \theta \leftarrow \theta - \big(\alpha\,QQ^\top + \gamma\,(I - QQ^\top)\big)\,v

    v is the base rule's own step (heavy ball, or Adam with ``cospace="adam"``) from the whole gradient, Q the k
    principal directions of its last ``window`` steps v, :math:`\alpha` is ``dominant`` and :math:`\gamma` ``bulk``. The
    abstract names the estimator (PCA of past updates); whether it centres them is left open: ``centred``. Q is one
    span of the whole vector of parameters here; the paper also does it block by block. Until more than k steps are
    known at a refresh there is no Q, and v is taken as it is.
    """
    rule = Rescaled(outside_step(cospace, lr, momentum), within=dominant, outside=bulk, whole=True)
    return SubspaceNewton(model, PrincipalUpdates(k, window, centred), Drop(), rule, loss, refresh_every=refresh_every)


def gradient_centralisation(
    model: nn.Module,
    lr: float = 0.1,
    momentum: float = 0.9,
    *,
    cospace: Cospace = "sgd",
    loss: LossLike = "cross_entropy",
) -> SubspaceNewton:
    r"""Gradient centralisation (Yong et al., arXiv 2004.01461, eq. 1 and 2): the mean directions are left out.

    .. math:: \Phi(g)_i = g_i - \mu_{g_i} = (I - ee^\top)\,g_i, \qquad e = \mathbf 1/\sqrt c

    for the part :math:`g_i` of each output unit's c weights; biases and gains stay as they are. The base rule (heavy
    ball, or Adam with ``cospace="adam"``) is given :math:`\Phi(g)`, and its step is taken as it is. With any other
    optimiser, and at no cost: :class:`~curvspace.optim.span_filter.SpanFilter`.
    """
    rule = Rescaled(outside_step(cospace, lr, momentum), within=1.0)
    return SubspaceNewton(model, MeanDirections(), Drop(), rule, loss, refresh_every=10**9)


def _spread(basis: ExtremeEigenvectors, clip: float) -> Tensor:
    return basis.spread().nan_to_num(nan=1.0).clamp(1.0, clip)
