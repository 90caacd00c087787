"""A hash of the code that a job would run, so that editing a module reruns the jobs which import it, and no others.

Snakemake does not see what a job imports. Here the *static import closure* of a job's entry points is followed
through the repository (nothing is imported), and the normalised source of what it reaches is hashed. Comments,
docstrings, blank lines and trailing space do not count; the hash is the same on every version of Python.

Two grains: a module counts as a whole; of a ``module:function`` root only the function counts, the definitions of
its module that it reaches by name, and the imports that those use.

Modules loaded by a computed name (``importlib.import_module(variable)``) are invisible here and must be named as
roots. Names that a package exports lazily (a ``__getattr__`` in its ``__init__``) are followed to their module by
the imports under ``if TYPE_CHECKING:`` or by a table of strings in the ``__init__``; one that cannot be followed is
an error, never a gap. Such an ``__init__`` itself does not count, so that a new export reruns nothing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from workflow.source import CodeError, Found, Module, found_in, trimmed, type_checking

Binding = tuple[str, str | None]
"""What a name of a module stands for: (module, None) or (module, name in it)."""


class Code:
    """The repository's modules. ``roots``: folders that imports are looked up in, first match wins.

    What was found is kept: the source is that of the moment when it was first read.
    """

    def __init__(self, *roots: str | Path):
        self.roots = [Path(root) for root in roots]
        self._modules: dict[str, Module | None] = {}
        self._needs: dict[str, frozenset[str]] = {}
        self._reached: dict[tuple[str, str], tuple[str, set[str]]] = {}
        self._texts: dict[str, str] = {}
        self._hashes: dict[tuple[str, ...], str] = {}

    def module(self, name: str) -> Module | None:
        """The repository's module of that name, None for one from elsewhere."""
        if name not in self._modules:
            stems = [root.joinpath(*name.split(".")) for root in self.roots]
            files = [f for stem in stems for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()]
            self._modules[name] = Module(name, files[0]) if files else None
        return self._modules[name]

    def hash(self, *roots: str) -> str:
        """Sixteen hex digits for what the roots (``module`` or ``module:function``) would run.

        Raises ``CodeError`` for a root which the repository has not, unless its first part is no package of ours:
        then it is an installed library's, whose code is not ours to watch, and only its name counts.
        """
        key = tuple(sorted(set(roots)))
        if key not in self._hashes:
            digest = hashlib.sha256()
            for part in self._parts(key):
                digest.update(part.encode() + b"\0")
            self._hashes[key] = digest.hexdigest()[:16]
        return self._hashes[key]

    def modules(self, *roots: str) -> set[str]:
        """The modules of the repository of which something counts in the hash of these roots."""
        return {part.partition("\n")[0].partition(":")[0] for part in self._parts(roots)}

    def _parts(self, roots: Iterable[str]) -> list[str]:
        whole: set[str] = set()
        parts: set[str] = set()
        for root in roots:
            name, _, function = root.partition(":")
            module = self.module(name)
            if module is None:
                if self.module(name.split(".")[0]):
                    raise CodeError(f"there is no module {name} in the repository (asked for as {root!r})")
                parts.add(f"installed {root}")
            elif not function:
                whole.add(name)
            else:
                text, imports = self._reach(module, function)
                parts.add(f"{root}\n{text}")
                whole |= imports - {name}
        return sorted(parts) + [f"{name}\n{self._text(name)}" for name in sorted(self.closure(whole))]

    def _text(self, name: str) -> str:
        if name not in self._texts:
            module = self.module(name)
            self._texts[name] = "" if module is None or module.is_index else module.text()
        return self._texts[name]

    def table(self, name: str, variable: str) -> dict[str, str]:
        """A module's table of strings, read without importing the module."""
        module = self.module(name)
        for statement in module.definitions.get(variable, []) if module else []:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
                return ast.literal_eval(statement.value)
        raise CodeError(f"there is no table {variable} in {name}")

    def closure(self, names: Iterable[str]) -> set[str]:
        """The modules of the repository that importing these, and what they do, would load."""
        seen: set[str] = set()
        todo = [name for name in names if self.module(name)]
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(self._needed_by(name))
        return seen

    def imports(self, name: str) -> set[str]:
        """The modules of the repository that a module's own import statements name."""
        module = self.module(name)
        return self._imports(module, module.found.values()) - set(self._parents(name)) if module else set()

    def is_index(self, name: str) -> bool:
        """Whether a module is a package's ``__init__`` which only exports names, or is empty."""
        module = self.module(name)
        return module is not None and (module.is_index or not module.text())

    def _needed_by(self, name: str) -> frozenset[str]:
        if name not in self._needs:
            module = self.module(name)
            assert module is not None
            self._needs[name] = frozenset(
                self._imports(module, module.found.values()) - {name} | set(self._parents(name))
            )
        return self._needs[name]

    def _parents(self, name: str) -> list[str]:
        """Packages whose ``__init__`` runs before the module."""
        parts = name.split(".")
        return [p for p in (".".join(parts[:i]) for i in range(1, len(parts))) if self.module(p)]

    def _imports(self, module: Module, statements: Iterable[Found]) -> set[str]:
        """Modules of the repository which the code imports, lazily exported names followed to their module."""
        found: set[str] = set()
        bindings: dict[str, Binding] = {}
        statements = list(statements)[::-1]
        for statement in statements:
            for node in statement.imports:
                for local, target in self._targets(module, node):
                    found |= self._resolve(module, *target)
                    bindings[local] = target
        for statement in statements:
            for dotted in statement.attributes:
                found |= self._attribute(module, dotted, bindings)
        return found | {parent for name in found for parent in self._parents(name)}

    def _attribute(self, module: Module, dotted: list[str], bindings: dict[str, Binding]) -> set[str]:
        """The module behind ``package.name`` where the package exports the name lazily."""
        head, *rest = dotted
        if head not in bindings:
            return set()
        owner, name = bindings[head]
        package = f"{owner}.{name}" if name else owner
        while rest and self.module(f"{package}.{rest[0]}"):
            package = f"{package}.{rest.pop(0)}"
        return self._resolve(module, package, rest[0]) if rest and self.module(package) else set()

    def _targets(self, module: Module, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Binding]]:
        """(local name, what it stands for) of an import statement."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, (alias.name, None)) if alias.asname else (top, (top, None))
                yield alias.name, (alias.name, None)  # `import a.b` loads a.b, though it binds a alone
            return
        base = node.module or ""
        if node.level:
            parents = module.package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            yield alias.asname or alias.name, (base, alias.name)

    def _resolve(self, importer: Module, owner: str, name: str | None) -> set[str]:
        """The modules that ``from owner import name`` loads."""
        module = self.module(owner)
        if module is None:
            return {f"{owner}.{name}"} if name and self.module(f"{owner}.{name}") else set()
        if name is None or name == "*" or name in module.definitions:
            return {owner}
        if self.module(f"{owner}.{name}"):
            return {owner, f"{owner}.{name}"}
        if "__getattr__" not in module.definitions:
            return {owner}  # bound in an `if`, `try` or `for` of the module, or an error when it runs
        if target := self._lazy(module, name):
            return {owner, target}
        if name.startswith("__"):
            return {owner}
        raise CodeError(
            f"{importer.file}: {owner} exports {name} in a way that cannot be followed; import it from its own module"
        )

    def _lazy(self, package: Module, name: str) -> str | None:
        """The module behind a lazily exported name."""
        for node in ast.walk(package.tree):
            if isinstance(node, ast.If) and type_checking(node):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.ImportFrom | ast.Import):
                        for local, (owner, attribute) in self._targets(package, inner):
                            if local == name:
                                return f"{owner}.{attribute}" if self.module(f"{owner}.{attribute}") else owner
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if found := self._table_entry(package, name, key, value):
                        return found
        return None

    def _table_entry(self, package: Module, name: str, key: ast.expr | None, value: ast.expr) -> str | None:
        """``{"name": "module"}`` or ``{"module": ("name", …)}`` with absolute or relative module names."""
        keys = [n.value for n in ast.walk(key) if isinstance(n, ast.Constant)] if key else []
        values = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant)]
        for names, modules in ((keys, values), (values, keys)):
            if name in names:
                for text in (m for m in modules if isinstance(m, str)):
                    stem = text.partition(":")[0]
                    for candidate in (stem, f"{package.name}.{stem.lstrip('.')}"):
                        if stem and self.module(candidate):
                            return candidate
        return None

    def _reach(self, module: Module, function: str) -> tuple[str, set[str]]:
        """Source of the definitions that a function of the module reaches by name, and the modules they import.

        Statements that bind no name (calls, conditions) run on import whatever is used, so they always count.
        """
        key = (module.name, function)
        if key not in self._reached:
            self._reached[key] = self._follow(module, function)
        return self._reached[key]

    def _follow(self, module: Module, function: str) -> tuple[str, set[str]]:
        if function not in module.definitions:
            raise CodeError(f"{module.file} has no {function}")
        todo, seen, reached = [function, ""], set(), set()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for statement in module.definitions.get(name, []):
                reached.add(statement)
                todo.extend(module.found[statement].names)
        ordered = [s for s in module.tree.body if s in reached]
        code = [s for s in ordered if not isinstance(s, ast.Import | ast.ImportFrom)]
        imports = [trimmed(s, seen) for s in ordered if isinstance(s, ast.Import | ast.ImportFrom)]
        used = [s for s in imports if s]
        text = "\n".join([*map(ast.unparse, used), module.text(code)])
        found = [*map(found_in, used), *(module.found[s] for s in code)]
        return text, self._imports(module, found) | set(self._parents(module.name))
