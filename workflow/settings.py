"""The whole config from what the user wrote: the settings of the chosen scale, and the user's values laid over them.

A settings file is a piece of config in the folder of a study, or in that of what studies share. Every scale is laid
over the default one. Of two studies each may bring a data set, model, task or optimiser of one name, if it is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from snakemake.utils import update_config

from curvspace.errors import UserError
from papers import registry
from workflow import config_files

DEFAULT = "default"


def based(config: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The user's config over the ``config.yaml`` beside the code, from wherever Snakemake was started."""
    total = files([root / "config.yaml"])
    update_config(total, deepcopy(dict(config)))
    return total


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with all settings in it; what cannot be understood ends the program with one line."""
    try:
        return laid_over(config)
    except UserError as error:
        sys.exit(f"config: {error}")


def check_file(name: str) -> None:
    """End the program with one line, file and line number first, if a YAML file of config has a fault.

    Snakemake has read it by then, but takes a key that stands twice, or that is no text, without a word.
    """
    try:
        if Path(name).suffix in (".yaml", ".yml") and Path(name).exists():
            config_files.read(Path(name))
    except UserError as error:
        sys.exit(f"config: {error}")


def laid_over(config: Mapping[str, Any]) -> dict[str, Any]:
    """The user's config over the settings of its studies, each at its scale. A whole config stays as it is."""
    scale = config.get("scale", DEFAULT)
    studies = _studies(config.get("studies"), scale)
    chosen = {name: block["scale"] for name, block in studies.items() if name in registry.folders()}
    total: dict[str, Any] = {}
    origin: dict[tuple[str, str], str] = {}
    for common in dict.fromkeys(chosen.values() or [scale]):
        _add(total, at_scale(registry.COMMON, common), f"what studies share at scale {common}", origin)
    for name, own in chosen.items():
        _add(total, at_scale(name, own), f"study {name} at scale {own}", origin)
    written = {key: value for key, value in config.items() if value is not None}
    update_config(total, deepcopy({**written, "scale": scale, "studies": studies}))
    return total


def at_scale(name: str, scale: str) -> dict[str, Any]:
    """The settings of a study, or of what studies share, at a scale."""
    total = registry.settings(name, DEFAULT) or {}
    if scale != DEFAULT:
        over = registry.settings(name, scale)
        if over is None and total and name != registry.COMMON:
            raise UserError(f"study {name} has no settings at scale {scale!r}; give it another scale or leave it out")
        update_config(total, over or {})
    return total


def files(paths: list[Path]) -> dict[str, Any]:
    """YAML files laid over each other key by key, as Snakemake does with ``--configfile``."""
    total: dict[str, Any] = {}
    for file in paths:
        update_config(total, config_files.read(file))
    return total


def _studies(value: Any, scale: str) -> dict[str, dict[str, Any]]:
    """Name -> block with its scale, of a list of names, or of a mapping to blocks or scales."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = {name: {} for name in value}
    if not isinstance(value, Mapping):
        raise UserError(f"studies = {value!r} is not allowed; allowed: a list of names, or a block with keys")
    blocks = {}
    for name, block in value.items():
        block = {"scale": block} if isinstance(block, str) else block or {}
        if not isinstance(block, Mapping):
            raise UserError(f"studies.{name} = {block!r} is not allowed; allowed: a scale, or a block of settings")
        blocks[name] = {"scale": scale, **block}
    for key, found in (("scale", scale), *((f"studies.{name}", block["scale"]) for name, block in blocks.items())):
        if not isinstance(found, str) or found not in registry.scales():
            raise UserError(f"{key} = {found!r} is not allowed; allowed: {', '.join(sorted(registry.scales()))}")
    return blocks


def _add(total: dict[str, Any], part: Mapping[str, Any], source: str, origin: dict[tuple[str, str], str]) -> None:
    """Add settings to what is there; one name with two different values is an error."""
    for section, entries in part.items():
        for name, value in entries.items():
            there = total.setdefault(section, {})
            if name in there and there[name] != value:
                first = origin[section, name]
                raise UserError(f"{section}.{name} is one thing in {first} and another in {source}; rename one of them")
            there[name] = value
            origin.setdefault((section, name), source)
