"""Optimisers that evaluate the model themselves: ``loss = opt.step(inputs, targets)``.

Names are loaded when they are first used, so that a job imports (and depends on) its own optimiser only.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "base": ("Costs", "ModelOptimizer"),
    "first_order": ("FirstOrder",),
    "subspace_newton": ("SubspaceNewton",),
    "bases": ("ClassGradients", "Joint", "MeanDirections", "PastUpdates", "PrincipalUpdates", "RandomDirections"),
    "eigenbases": ("BottomEigenvectors", "ExtremeEigenvectors", "TopEigenvectors"),
    "inside": ("DiagonalNewton", "MomentumNewton", "RayleighRitzNewton", "SaddleFree", "Scale"),
    "outside": ("Adam", "GradientDescent", "Rescaled"),
    "drop": ("Drop",),
    "damping": ("AdaptiveDamping",),
    "configurations": (
        "bulk_sgd",
        "class_gradient_newton",
        "dominant_sgd",
        "low_rank_newton",
        "rayleigh_ritz_newton",
    ),
    "span_filter": ("SpanFilter",),
    "rivals": ("bsfa", "fosi", "gradient_centralisation", "nudged_sgd"),
    "curveball": ("CurveBall",),
    "levenberg_marquardt": ("LevenbergMarquardt",),
    "negative_curvature": ("NegativeCurvature",),
    "registry": ("build", "module_of"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
