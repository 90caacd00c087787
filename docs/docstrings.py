"""Docstrings as the documentation's Markdown: roles and equations of reStructuredText, for the API reference."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|obj|exc):`~?([^`]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^( *)\.\. math::[ ]*(.*(?:\n(?:\1[ ]+\S.*|[ ]*(?=\n\1[ ]+\S)))*)", re.MULTILINE)

RETURNS = re.compile(r"^Returns\n-{3,}\n(?=\S+ \S)", re.MULTILINE)  # prose, where the parser wants a type
SECTION = re.compile(r"-{3,}$")
ENTRY = re.compile(r"(\w[\w, ]*) : (.*)")


class AsMarkdown(griffe.Extension):
    """Each docstring that was loaded, converted."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Equations between ``$`` or, as blocks, ``$$``; a role as the last part of its name, in code."""
    text = RETURNS.sub("**Returns** ", text)
    text = BLOCK.sub(_block, _closed_sections(text))
    text = INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    return ROLE.sub(lambda found: f"`{_last(found[0], found[1])}`", text)


def _closed_sections(text: str) -> str:
    """Lists of parameters, attributes and errors as the parser wants them.

    Prose that follows one gets a heading, else it is read as an entry; ``name : text`` of an attribute is no type.
    """
    lines = text.splitlines()
    result, listing = [], ""
    for i, line in enumerate(lines):
        after = lines[i + 1] if i + 1 < len(lines) else ""
        if SECTION.match(after):
            listing = line
        elif listing and _starts_prose(line, lines[i - 1], after):
            result += ["Notes", "-----"]
            listing = ""
        entry = ENTRY.match(line)
        result += [entry[1], f"    {entry[2]}"] if entry and listing == "Attributes" else [line]
    return "\n".join(result)


def _starts_prose(line: str, before: str, after: str) -> bool:
    entry = ENTRY.match(line) or after.startswith("    ")
    return bool(line.strip()) and not line[0].isspace() and not before.strip() and not entry


def _block(found: re.Match[str]) -> str:
    indent, body = found[1], textwrap.dedent(found[2]).strip()
    inner = " ".join(line.strip() for line in body.splitlines())
    return f"{indent}$$\n{indent}{inner}\n{indent}$$\n"


def _last(role: str, target: str) -> str:
    return target.rpartition(".")[2] if "`~" in role else target
