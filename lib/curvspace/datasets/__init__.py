"""Data sets: obtained once, checked, kept as plain arrays; loaded whole onto the device as splits of a variant."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvspace.datasets.catalogue import folder_name as folder_name
    from curvspace.datasets.catalogue import prepare_options as prepare_options
    from curvspace.datasets.loading import DataSet as DataSet
    from curvspace.datasets.loading import Split as Split
    from curvspace.datasets.loading import load as load
    from curvspace.datasets.obtain import prepare as prepare

_HOMES = {
    "DataSet": "curvspace.datasets.loading",
    "Split": "curvspace.datasets.loading",
    "load": "curvspace.datasets.loading",
    "prepare": "curvspace.datasets.obtain",
    "folder_name": "curvspace.datasets.catalogue",
    "prepare_options": "curvspace.datasets.catalogue",
}
__all__ = ["DataSet", "Split", "folder_name", "load", "prepare", "prepare_options"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
