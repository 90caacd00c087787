"""Newton's method in the tiny subspace: train in it, measure it, and rebuild the papers about it.

Names are imported when first used, so that ``import curvspace`` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvspace.curvature.class_gradients import class_gradients as class_gradients
    from curvspace.curvature.density import spectral_density as spectral_density
    from curvspace.curvature.eigensolver import eigsh as eigsh
    from curvspace.curvature.tracker import track as track
    from curvspace.landscape import LossScanner as LossScanner
    from curvspace.objective import Objective as Objective

__version__ = "0.1.0"

_EXPORTS = {
    "LossScanner": "curvspace.landscape",
    "Objective": "curvspace.objective",
    "eigsh": "curvspace.curvature.eigensolver",
    "track": "curvspace.curvature.tracker",
    "spectral_density": "curvspace.curvature.density",
    "class_gradients": "curvspace.curvature.class_gradients",
}
__all__ = ["LossScanner", "Objective", "__version__", "class_gradients", "eigsh", "spectral_density", "track"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
