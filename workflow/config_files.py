"""Config files read with care: what is wrong with one is a line with the file and, where there is one, the line.

``python -m workflow.config_files my.yaml …`` checks config files as they would be laid over ``config.yaml``, without
Snakemake, which reads the files of ``--configfile`` itself and tells less.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from curvspace.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once in a block, and is text."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called once a block, before ``<<`` brings in keys from elsewhere."""
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _Fault(key, f"{getattr(key, 'value', 'a block')} is no text, as a key must be; quote it")
            if key.value in seen:
                raise _Fault(key, f"{key.value} stands twice in its block, and only the last one would count")
            seen.add(key.value)
        super().flatten_mapping(node)


class _Fault(yaml.MarkedYAMLError):
    def __init__(self, node: yaml.Node, problem: str):
        super().__init__(problem=problem, problem_mark=node.start_mark)


def read(file: Path) -> dict[str, Any]:
    """The content of a config file.

    Raises
    ------
    UserError
        If it is missing, empty, not UTF-8, or no YAML with keys at the top.
    """
    text = _text(file)
    try:
        found = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{place}: {_problem(error, text)}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{file}{_place(error, text)}: {' '.join(str(error).split())}") from None
    if found is None:
        raise UserError(f"{file} is empty; write keys in it, or leave the file out")
    if not isinstance(found, dict):
        raise UserError(f"{file} has no keys at its top: it is {type(found).__name__}; write  key: value")
    return found


def _text(file: Path) -> str:
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} is not there") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: byte 0x{raw[error.start]:02x} is no UTF-8; save the file as UTF-8") from None


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """What is wrong, in our words where we know the cause."""
    mark = error.problem_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if re.match(r"[ ]*\t", line):
        return "the line begins with a tab; indent by spaces"
    if isinstance(error, _Fault):
        return str(error.problem)
    said = " ".join(part for part in (error.context, error.problem) if part)
    return f"no YAML: {said}"


def _place(error: Exception, text: str) -> str:
    """``:line`` of an error that knows its position alone."""
    position = getattr(error, "position", None)
    return "" if position is None else f":{text.count(chr(10), 0, position) + 1}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Check ``config.yaml`` with the files given over it, down to the plan of all jobs."""
    from workflow import built_checks, settings, specs

    root = Path(__file__).parents[1]
    names = sys.argv[1:] if arguments is None else arguments
    try:
        written = settings.files([root / "config.yaml", *map(Path, names)])
    except UserError as error:
        sys.exit(f"config: {error}")
    plan = specs.load(settings.whole(written), root)
    jobs = list(plan.jobs())
    if lines := built_checks.said_of(plan, jobs):
        sys.exit("\n".join(lines))
    print(f"config: nothing wrong; {len(jobs)} jobs")


if __name__ == "__main__":
    main()
