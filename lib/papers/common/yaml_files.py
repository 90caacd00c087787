"""The YAML files of the studies' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it, many times as fast: a plan reads all settings and claims."""


def read(file: Path) -> Any:
    """The content of a YAML file; None of an empty one."""
    return yaml.load(file.read_text(encoding="utf-8"), LOADER)  # a SafeLoader
