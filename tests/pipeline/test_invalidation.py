"""The hash of what a job would run: which edits change it, and which do not."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from workflow.invalidation import Code
from workflow.source import CodeError

ROOT = Path(__file__).parents[2]
FILES = {
    "pack/__init__.py": '''
        """A package which exports lazily."""
        from importlib import import_module
        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from pack.typed import Typed as Typed

        _EXPORTS = {"Tabled": "tabled", "other": ("Grouped",)}

        def __getattr__(name):
            return getattr(import_module(name), name)
        ''',
    "pack/typed.py": "class Typed: pass",
    "pack/tabled.py": "class Tabled: pass",
    "pack/other.py": "class Grouped: pass",
    "pack/deep.py": "VALUE = 1",
    "pack/uses.py": '''
        """Docstring."""
        import json
        from pack import Typed
        from . import deep

        LIMIT = 3  # a remark

        def first():
            """Another."""
            return Typed, LIMIT

        def second():
            from pack import Tabled

            return Tabled, helper()

        def helper():
            return deep.VALUE

        def third():
            import pack

            return pack.Grouped
        ''',
    "pack/registry.py": 'KINDS = {"a": "pack.typed:Typed"}\n\ndef build(kind):\n    return KINDS[kind]',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(dedent(content).strip() + "\n")
    return tmp_path


def changed(tree: Path, path: str, old: str, new: str, *roots: str) -> bool:
    """Whether an edit changes the hash of the roots."""
    before = Code(tree).hash(*roots)
    file = tree / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    after = Code(tree).hash(*roots)
    file.write_text(text)
    return before != after


@pytest.mark.parametrize(
    ("root", "modules"),
    [
        ("pack.uses", {"typed", "tabled", "other", "deep"}),
        ("pack.uses:first", {"typed"}),
        ("pack.uses:second", {"tabled", "deep"}),
        ("pack.uses:helper", {"deep"}),
        ("pack.uses:third", {"other"}),
    ],
)
def test_the_closure_follows_direct_relative_lazy_and_attribute_imports(tree, root, modules):
    for module in ("typed", "tabled", "other", "deep"):
        edited = changed(tree, f"pack/{module}.py", FILES[f"pack/{module}.py"].split()[-1], "2", root)
        assert edited == (module in modules), module


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a remark", "# another remark"),
        ('"""Docstring."""', '"""A longer one\n\nover several lines."""'),
        ('"""Another."""', '"""One."""'),
        ("LIMIT = 3", "\n\nLIMIT = 3   "),
    ],
)
def test_remarks_and_blanks_do_not_count(tree, old, new):
    assert not changed(tree, "pack/uses.py", old, new, "pack.uses")
    assert not changed(tree, "pack/uses.py", old, new, "pack.uses:first")


def test_code_counts(tree):
    assert changed(tree, "pack/uses.py", "LIMIT = 3", "LIMIT = 4", "pack.uses")
    assert changed(tree, "pack/uses.py", "LIMIT = 3", "LIMIT = 4", "pack.uses:first")
    assert not changed(tree, "pack/uses.py", "LIMIT = 3", "LIMIT = 4", "pack.uses:second")
    assert changed(tree, "pack/uses.py", "return deep.VALUE", "return -deep.VALUE", "pack.uses:second")
    assert changed(tree, "pack/uses.py", "import json", "print(1)", "pack.uses:first"), "it runs on import"


def test_blanks_within_a_string_count(tree):
    (tree / "pack" / "deep.py").write_text('VALUE = """a\n\nb  # c\n"""\n')
    assert changed(tree, "pack/deep.py", "a\n\nb", "a\nb", "pack.deep")
    assert changed(tree, "pack/deep.py", "# c", "# d", "pack.deep")


def test_a_new_export_or_kind_does_not_count_by_itself(tree):
    assert not changed(tree, "pack/__init__.py", '"Tabled": "tabled"', '"Tabled": "tabled", "New": "new"', "pack.uses")
    assert not changed(tree, "pack/registry.py", '"a": ', '"b": "pack.deep:VALUE", "a": ', "pack.registry")
    assert changed(tree, "pack/registry.py", "return KINDS", "return +KINDS", "pack.registry")
    assert Code(tree).table("pack.registry", "KINDS") == {"a": "pack.typed:Typed"}


def test_what_cannot_be_followed_is_an_error(tree):
    (tree / "pack" / "bad.py").write_text("from pack import Unknown\n")
    with pytest.raises(CodeError, match="pack exports Unknown in a way that cannot be followed"):
        Code(tree).hash("pack.bad")
    with pytest.raises(CodeError, match=r"there is no module pack\.absent"):
        Code(tree).hash("pack.absent")
    with pytest.raises(CodeError, match="has no absent"):
        Code(tree).hash("pack.uses:absent")


def test_of_an_installed_library_only_the_name_counts(tree):
    assert Code(tree).hash("torchvision.models:resnet18") != Code(tree).hash("torchvision.models:resnet34")


def test_a_syntax_error_is_one_line(tree):
    (tree / "pack" / "deep.py").write_text("def broken(:\n")
    with pytest.raises(CodeError, match=r"deep\.py, line 1"):
        Code(tree).hash("pack.uses")


def test_the_hash_is_the_same_on_every_version_of_python(tree):
    """Pinned: a digest over text, not over a parser's output."""
    assert Code(tree).hash("pack.uses:second") == "b2b4cd692868cb91"


def test_every_module_of_the_library_can_be_followed():
    code = Code(ROOT / "lib", ROOT)
    for file in (ROOT / "lib" / "curvspace").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT / "lib").with_suffix("").parts).removesuffix(".__init__")
        assert len(code.hash(name)) == 16


@pytest.mark.parametrize("stage", ["figure", "table", "claims"])
def test_figures_tables_and_claims_need_no_torch(stage):
    """By their imports: torch stands in no module that they load but in a deferred import of the device's name."""
    code = Code(ROOT / "lib", ROOT)
    modules = code.closure([f"curvspace.cli.{stage}"])
    assert "curvspace.training.record" not in modules
    assert "curvspace.objective" not in modules
    assert "curvspace.device" not in modules
