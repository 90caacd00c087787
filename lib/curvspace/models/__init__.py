"""The papers' networks and a registry which builds them, or a user's own, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvspace.models.registry import KINDS as KINDS
    from curvspace.models.registry import build as build
    from curvspace.models.registry import module_of as module_of

__all__ = ["KINDS", "build", "module_of"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from curvspace.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
