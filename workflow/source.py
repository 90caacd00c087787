"""One source file, read and not run: what it binds, imports and names, and its text without what does not count."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

REGISTRY = "KINDS"
"""Tables of this name map kinds to ``module:function``. An entry counts for the jobs that name its kind, as a root."""


class CodeError(ValueError):
    """An entry point or an imported name cannot be found in the repository; one line for the user."""


class Module:
    """One source file, parsed on demand."""

    def __init__(self, name: str, file: Path):
        self.name = name
        self.file = file
        self.package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        self.source = file.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        try:
            return ast.parse(self.source, str(self.file))
        except SyntaxError as error:
            raise CodeError(f"{self.file}, line {error.lineno}: {error.msg}") from None

    @cached_property
    def lines(self) -> list[str]:
        """Source lines without comments, docstrings and trailing space; empty ones are blank or dropped."""
        lines = self.source.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
        verbatim = {row for found in self.found.values() for row in found.verbatim}
        lines = [f"{line}\0" if row in verbatim else line.rstrip() for row, line in enumerate(lines, 1)]
        for node in self._unread():
            if not lines[node.lineno - 1][: node.col_offset].strip():
                for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                    lines[row - 1] = ""
        return lines

    @cached_property
    def found(self) -> dict[ast.stmt, Found]:
        """What lies in each top-level statement."""
        return {statement: found_in(statement) for statement in self.tree.body}

    def _unread(self) -> Iterator[ast.stmt]:
        """Statements whose text does not count: docstrings, imports for type checkers, registries."""
        for statement, found in self.found.items():
            yield from found.docstrings
            if _is_docstring(statement) or type_checking(statement) or _bound(statement) == [REGISTRY]:
                yield statement

    @property
    def is_index(self) -> bool:
        """Whether it is a package's ``__init__`` which only exports names lazily."""
        allowed = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
        return (
            self.file.name == "__init__.py"
            and "__getattr__" in self.definitions
            and all(
                isinstance(s, allowed)
                or _is_docstring(s)
                or type_checking(s)
                or _bound(s) in (["__getattr__"], ["__dir__"])
                for s in self.tree.body
            )
        )

    def text(self, nodes: Iterable[ast.stmt] | None = None) -> str:
        """Normalised source of the module, or of some of its top-level statements."""
        lines = self.lines if nodes is None else [line for node in nodes for line in self.lines[_rows(node)]]
        return "\n".join(line for line in lines if line)

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """Top-level statements by the names that they bind; those that bind none stand under ``""``."""
        table: dict[str, list[ast.stmt]] = {"": []}
        for statement in self.tree.body:
            if not _is_docstring(statement) and not type_checking(statement):
                for name in _bound(statement) or [""]:
                    table.setdefault(name, []).append(statement)
        return table


def _rows(node: ast.stmt) -> slice:
    decorators = getattr(node, "decorator_list", [])
    return slice(min([node.lineno, *(d.lineno for d in decorators)]) - 1, node.end_lineno)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _bound(statement: ast.stmt) -> list[str]:
    """Names bound by a top-level definition, assignment or import; none for anything else."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0].replace("*", "") for alias in statement.names]
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [n for t in targets for n in ast.walk(t)]
        if all(isinstance(n, ast.Name | ast.Tuple | ast.List | ast.Store | ast.Starred) for n in names):
            return [n.id for n in names if isinstance(n, ast.Name)]
    return []


def type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Name | ast.Attribute):
        return False
    name = [node.test.id] if isinstance(node.test, ast.Name) else _dotted(node.test)
    return name in (["TYPE_CHECKING"], ["typing", "TYPE_CHECKING"])


@dataclass
class Found:
    """What one walk over a statement finds. Of what stands under ``if TYPE_CHECKING:``, which never runs, no import."""

    names: set[str] = field(default_factory=set)
    imports: list[ast.Import | ast.ImportFrom] = field(default_factory=list)
    attributes: list[list[str]] = field(default_factory=list)
    docstrings: list[ast.stmt] = field(default_factory=list)
    verbatim: set[int] = field(default_factory=set)
    """Rows of strings of several lines but their last: blanks at their ends are the string's content."""


def found_in(statement: ast.stmt) -> Found:
    found = Found()
    todo: list[tuple[ast.AST, bool]] = [(statement, True)]
    while todo:
        node, runs = todo.pop()
        if isinstance(node, ast.Name):
            found.names.add(node.id)
        elif isinstance(node, ast.JoinedStr | ast.Constant):
            found.verbatim.update(range(node.lineno, node.end_lineno or 0))
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.docstrings += filter(_is_docstring, node.body)
        elif isinstance(node, ast.Import | ast.ImportFrom) and runs:
            found.imports.append(node)
        elif isinstance(node, ast.Attribute) and runs and (dotted := _dotted(node)):
            found.attributes.append(dotted)
        hidden = node.body if isinstance(node, ast.If) and type_checking(node) else []
        todo += [(child, runs and child not in hidden) for child in ast.iter_child_nodes(node)]
    return found


def _dotted(node: ast.Attribute) -> list[str]:
    """``["a", "b", "c"]`` of the expression ``a.b.c``; empty for an attribute of anything but names."""
    parts: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return [inner.id, *reversed(parts)] if isinstance(inner, ast.Name) else []


def trimmed(node: ast.Import | ast.ImportFrom, used: set[str]) -> ast.Import | ast.ImportFrom | None:
    """The import statement with only the names that are used; None where none is."""
    names = [a for a in node.names if a.name == "*" or (a.asname or a.name).split(".")[0] in used]
    if not names:
        return None
    return ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)
