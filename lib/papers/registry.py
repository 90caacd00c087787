"""The folders of this package, each a paper or a study of our own, found by its ``study.py``: no list to keep.

A folder may have beside it ``claims.yaml``, ``captions.yaml``, ``front.yaml`` (what the report shows first),
``schema.yaml`` (what its block of the config may hold), ``checks.py`` (what a schema cannot say of it) and
``settings/{scale}.yaml``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import papers
from papers.common import yaml_files
from papers.common.study import Study

COMMON = "common"


def folders() -> dict[str, Path]:
    """Name -> folder of each study, by name."""
    found = {file.parent.name: file.parent for place in papers.__path__ for file in Path(place).glob("*/study.py")}
    return {name: found[name] for name in sorted(found) if name != COMMON}


def scales() -> set[str]:
    """All scales for which some study has settings."""
    return {file.stem for folder in folders().values() for file in folder.glob("settings/*.yaml")}


def settings(name: str, scale: str) -> dict[str, Any] | None:
    """The settings of a study, or of ``common``, at one scale, as the file has them; None where there is no file."""
    place = Path(papers.__path__[0]) / COMMON if name == COMMON else folders()[name]
    file = place / "settings" / f"{scale}.yaml"
    return _content(file) if file.is_file() else None


def schemas() -> dict[str, dict[str, Any]]:
    """The schema of each study's block of the config."""
    return {name: _content(folder / "schema.yaml") for name, folder in folders().items()}


def claim_files() -> dict[str, Path]:
    """The file of claims of each study that has one."""
    files = {name: folder / "claims.yaml" for name, folder in folders().items()}
    return {name: file for name, file in files.items() if file.is_file()}


def verdict_modules() -> list[str]:
    """The modules of verdict rules, besides the general ones."""
    return [f"papers.{name}.verdicts" for name, folder in folders().items() if (folder / "verdicts.py").is_file()]


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """One line for each wrong value that the ``checks.py`` of an enabled study finds in its block."""
    for name, block in (config.get("studies") or {}).items():
        if block.get("enabled", True) and (folders()[name] / "checks.py").is_file():
            yield from importlib.import_module(f"papers.{name}.checks").problems(block)


def declare(config: Mapping[str, Any]) -> Study:
    """All enabled studies of the config as one, their artefacts with captions."""
    total = Study()
    for name, block in (config.get("studies") or {}).items():
        if not block.get("enabled", True):
            continue
        part: Study = importlib.import_module(f"papers.{name}.study").declare(config)
        captions = _content(folders()[name] / "captions.yaml")
        total.runs += part.runs
        total.measures += part.measures
        total.artefacts += [replace(a, caption=captions.get(a.id, "")) for a in part.artefacts]
    return total.close()


def pictures(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the enabled studies put on the report's front page: ``question``, ``figure`` and ``claims`` of each.

    By study in the order of their names, not the config's: one that is written out and read again has the same page.
    """
    enabled = sorted(name for name, block in (config.get("studies") or {}).items() if block.get("enabled", True))
    return [one for name in enabled for one in _content(folders()[name] / "front.yaml") or []]


def _content(file: Path) -> Any:
    """A YAML file's content; empty where there is no file. What it names twice by an anchor is two things here."""
    found = yaml_files.read(file) if file.is_file() else None
    return json.loads(json.dumps(found or {}))
