"""Dependencies point one way: workflow, papers, curvspace; what is drawn and judged needs no torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workflow.invalidation import Code

ROOT = Path(__file__).parents[2]
CODE = Code(ROOT / "lib", ROOT)


def modules(package: str, base: Path = ROOT / "lib") -> list[str]:
    files = sorted(f for f in (base / package).rglob("*.py") if "study_template" not in f.parts)  # a user's, to be
    return [".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__") for file in files]


LIBRARY = modules("curvspace")
PAPERS = modules("papers")
WITHOUT_TORCH = [n for n in PAPERS if n.split(".")[-1].split("_")[0] in ("study", "tables", "figures", "verdicts")]


def inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def imports_torch(code: Code, name: str) -> bool:
    """Whether a module imports torch anywhere, but for type checkers."""
    module = code.module(name)
    assert module is not None
    todo: list[ast.AST] = [module.tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(inside(imported, "torch") for imported in names):
            return True
        todo.extend(ast.iter_child_nodes(node))
    return False


def trespasses(code: Code, name: str) -> set[str]:
    """The modules behind a module that it must not lead to."""
    reached = code.closure([name])
    if inside(name, "curvspace"):
        return {n for n in reached if not inside(n, "curvspace")}
    if inside(name, "workflow"):
        return set()
    own = ".".join(name.split(".")[:2])
    allowed = {"papers.common", own} | ({"papers.registry"} if own == "papers.cli" else set())
    others = {n for n in reached if n != "papers" and inside(n, "papers") and not any(inside(n, a) for a in allowed)}
    return others | {n for n in reached if inside(n, "workflow")}


def test_there_is_something_to_look_at():
    assert {"papers.a.study", "papers.b.figures_toy", "papers.tournament.tables"} <= set(WITHOUT_TORCH)
    assert len(LIBRARY) > 40


@pytest.mark.parametrize("name", [*LIBRARY, *PAPERS])
def test_dependencies_point_one_way(name):
    assert trespasses(CODE, name) == set()


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_declarations_tables_figures_and_verdicts_need_no_torch(name):
    assert [n for n in CODE.closure([name]) if imports_torch(CODE, n)] == []


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("curvspace.one", "import papers.a.study", {"papers", "papers.a", "papers.a.study"}),
        ("curvspace.one", "def f():\n    from workflow import plan", {"workflow", "workflow.plan"}),
        ("papers.common.one", "from papers.a import study", {"papers.a", "papers.a.study"}),
        ("papers.b.one", "from papers.a.study import x", {"papers.a", "papers.a.study"}),
        ("papers.b.one", "import workflow.plan", {"workflow", "workflow.plan"}),
        ("papers.b.one", "from papers.common import shared", set()),
        ("workflow.plan", "import papers.a.study", set()),
    ],
)
def test_a_wrong_import_is_found(tmp_path, name, line, found):
    texts = dict.fromkeys(("curvspace.one", "papers.a.study", "papers.common.shared", "workflow.plan"), "x = 1\n")
    for module, text in (texts | {name: f"{line}\n"}).items():
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / parent / "__init__.py").touch()
        file.write_text(text)
    assert trespasses(Code(tmp_path), name) == found


def test_torch_is_found_wherever_it_is_imported(tmp_path):
    lines = {
        "top": "import torch.nn",
        "inner": "def f():\n    from torch import nn",
        "types": "if TYPE_CHECKING:\n    import torch",
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.py").write_text(f"{line}\n")
    assert [name for name in lines if imports_torch(Code(tmp_path), name)] == ["top", "inner"]


def test_the_drawing_has_the_same_bytes_whatever_the_order_of_sets(tmp_path):
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT / 'lib'}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", "workflow.dependencies", str(tmp_path / f"{seed}.svg")]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
    kept = (ROOT / "docs" / "dependencies.svg").read_bytes()
    assert {file.read_bytes() for file in tmp_path.glob("*.svg")} == {kept}, "python -m workflow.dependencies renews it"
