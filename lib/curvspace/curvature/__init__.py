"""Curvature of a loss as linear operators, and what is computed from them.

Names are imported when first used: a job loads only the modules that it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvspace.curvature.class_gradients import cross_class_gradients as cross_class_gradients
    from curvspace.curvature.dense import dense_eigh as dense_eigh
    from curvspace.curvature.dense import dense_matrix as dense_matrix
    from curvspace.curvature.dense import gram_eigh as gram_eigh
    from curvspace.curvature.density import SpectralDensity as SpectralDensity
    from curvspace.curvature.density import spectral_density as spectral_density
    from curvspace.curvature.differences import DifferenceHessianOperator as DifferenceHessianOperator
    from curvspace.curvature.eigensolver import EigenPairs as EigenPairs
    from curvspace.curvature.eigensolver import eigsh as eigsh
    from curvspace.curvature.fisher import EmpiricalFisherOperator as EmpiricalFisherOperator
    from curvspace.curvature.operators import GaussNewtonOperator as GaussNewtonOperator
    from curvspace.curvature.operators import HessianOperator as HessianOperator
    from curvspace.curvature.preconditioner import preconditioned as preconditioned
    from curvspace.curvature.projected import projected_gauss_newton as projected_gauss_newton
    from curvspace.curvature.trace import hutchpp as hutchpp
    from curvspace.curvature.tracker import SubspaceTracker as SubspaceTracker
    from curvspace.curvature.tracker import track as track

_EXPORTS = {
    "EigenPairs": "eigensolver",
    "GaussNewtonOperator": "operators",
    "DifferenceHessianOperator": "differences",
    "EmpiricalFisherOperator": "fisher",
    "HessianOperator": "operators",
    "SpectralDensity": "density",
    "SubspaceTracker": "tracker",
    "cross_class_gradients": "class_gradients",
    "dense_eigh": "dense",
    "dense_matrix": "dense",
    "eigsh": "eigensolver",
    "gram_eigh": "dense",
    "hutchpp": "trace",
    "preconditioned": "preconditioner",
    "projected_gauss_newton": "projected",
    "spectral_density": "density",
    "track": "tracker",
}
__all__ = [
    "DifferenceHessianOperator",
    "EigenPairs",
    "EmpiricalFisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "SpectralDensity",
    "SubspaceTracker",
    "cross_class_gradients",
    "dense_eigh",
    "dense_matrix",
    "eigsh",
    "gram_eigh",
    "hutchpp",
    "preconditioned",
    "projected_gauss_newton",
    "spectral_density",
    "track",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
