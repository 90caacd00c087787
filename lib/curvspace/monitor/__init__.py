"""Curvature followed along any training: plain PyTorch, Lightning, the Hugging Face Trainer.

Names are imported when first used, and the frameworks and loggers only by the names that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvspace.monitor.follow import CurvatureMonitor as CurvatureMonitor
    from curvspace.monitor.lightning import LightningMonitor as LightningMonitor
    from curvspace.monitor.sinks import CSVSink as CSVSink
    from curvspace.monitor.sinks import Sink as Sink
    from curvspace.monitor.sinks import TensorBoardSink as TensorBoardSink
    from curvspace.monitor.sinks import WandbSink as WandbSink
    from curvspace.monitor.trainer import TrainerMonitor as TrainerMonitor

_EXPORTS = {
    "CSVSink": "sinks",
    "CurvatureMonitor": "follow",
    "LightningMonitor": "lightning",
    "Sink": "sinks",
    "TensorBoardSink": "sinks",
    "TrainerMonitor": "trainer",
    "WandbSink": "sinks",
}
__all__ = [
    "CSVSink",
    "CurvatureMonitor",
    "LightningMonitor",
    "Sink",
    "TensorBoardSink",
    "TrainerMonitor",
    "WandbSink",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
