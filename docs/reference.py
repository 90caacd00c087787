"""The API reference: a page for each public module, every public name on one of them, equations as MathML."""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import re
from types import ModuleType
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

MODULES = {
    "objective": ["curvspace", "curvspace.losses"],
    "curvature": ["curvspace.curvature"],
    "subspace": ["curvspace.subspace", "curvspace.inner"],
    "optim": ["curvspace.optim"],
    "monitor": ["curvspace.monitor"],
    "landscape": ["curvspace.landscape"],
    "training": [f"curvspace.training.{part}" for part in ("run", "spec", "schedule", "average", "record")],
    "datasets": ["curvspace.datasets", "curvspace.models.registry"],
}
"""Page -> the modules whose public names it has; a name that an earlier page or module has is not repeated."""

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def public(module: ModuleType) -> list[str]:
    """Names of a module that are for users: ``__all__``, or the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("_")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def home(module: ModuleType, name: str) -> str:
    """Where a public name is defined: ``curvspace.curvature.eigensolver.eigsh`` for ``curvspace.eigsh``.

    A name whose optional package is not installed is looked up in the module's imports for type checkers.
    """
    try:
        value = getattr(module, name)
    except ImportError:
        return _imported_for_types(module)[name]
    return f"{getattr(value, '__module__', module.__name__)}.{getattr(value, '__qualname__', name)}"


def _imported_for_types(module: ModuleType) -> dict[str, str]:
    """Name -> full name of all that a module imports with ``from … import``, wherever that stands."""
    found = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ImportFrom)]
    return {part.asname or part.name: f"{node.module}.{part.name}" for node in found for part in node.names}


def pages() -> dict[str, list[tuple[str, list[str]]]]:
    """Page -> (module, full names that it shows there)."""
    shown: set[str] = set()
    found = {}
    # the pages of one subject come first: eigsh stands with curvature, though curvspace has it too
    for page in sorted(MODULES, key=lambda page: page == "objective"):
        found[page] = []
        for module_name in MODULES[page]:
            module = importlib.import_module(module_name)
            names = [home(module, name) for name in sorted(public(module), key=str.lower)]
            new = [name for name in dict.fromkeys(names) if name not in shown]
            shown.update(new)
            found[page].append((module_name, new))
    return {page: found[page] for page in MODULES}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for page, parts in pages().items():
        lines = [f"# {page.capitalize()}", ""]
        for module, names in parts:
            lines += [f"Import from `{module}`.", ""]
            lines += [line for name in names for line in (f"::: {name}", "")]
        files.append(File.generated(config, f"reference/{page}.md", content="\n".join(lines)))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Equations as MathML, which browsers draw without a script."""
    content = BLOCK.sub(lambda found: convert(html.unescape(found[1]).strip(), display="block"), content)
    return INLINE.sub(lambda found: convert(html.unescape(found[1]).strip()), content)
