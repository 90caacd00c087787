"""The built documentation: every public name with its equations, readable and searchable from disk."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
MKDOCS = Path(sys.executable).parent / "mkdocs"
pytest.importorskip("mkdocstrings", reason="the docs extra is not installed: pip install 'curvspace[docs]'")
for package in ("lightning", "transformers"):  # the reference has the monitors' classes, which import these
    pytest.importorskip(package, reason="the monitor extra is not installed: pip install 'curvspace[monitor]'")


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [str(MKDOCS), "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "lib"), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_is_on_a_page(site):
    reference = module("reference")
    anchors: dict[str, str] = {}
    for page in sorted((site / "reference").glob("*.html")):
        for name in re.findall(r'<h\d id="(curvspace[\w.]+)"', page.read_text(encoding="utf-8")):
            assert anchors.setdefault(name, page.name) == page.name, f"{name} stands on two pages"
    wanted = {
        reference.home(importlib.import_module(name), public)
        for names in reference.MODULES.values()
        for name in names
        for public in reference.public(importlib.import_module(name))
    }
    assert wanted <= set(anchors), sorted(wanted - set(anchors))
    for name in ("objective.Objective", "curvature.eigensolver.eigsh", "optim.curveball.CurveBall"):
        assert f"curvspace.{name}" in wanted


def test_modules_for_users_are_in_the_reference():
    reference = module("reference")
    listed = {name for names in reference.MODULES.values() for name in names}
    packages = {f"curvspace.{p.parent.name}" for p in (ROOT / "lib/curvspace").glob("*/__init__.py")}
    covered = {name.rpartition(".")[0] for name in listed} | listed
    assert packages - covered == {"curvspace.cli"}  # commands have a page of their own


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    """``from package import name`` would give one or the other, by what was imported before."""
    for package in (ROOT / "lib/curvspace").glob("**/__init__.py"):
        inside = {path.stem for path in package.parent.iterdir()}
        name = ".".join(package.parent.relative_to(ROOT / "lib").parts)
        assert not inside & set(getattr(importlib.import_module(name), "__all__", ())), name


def test_nothing_of_the_docstrings_is_left_unrendered(site):
    for page in (site / "reference").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        body = re.sub(r"<pre.*?</pre>|<script.*?</script>", "", text, flags=re.DOTALL)
        assert not re.search(r":math:|:class:|:func:|:mod:|\.\. math|arithmatex|``", body), page.name
        assert "<math" in text or page.name in ("training.html", "datasets.html", "landscape.html"), page.name


def test_pages_need_neither_network_nor_server(site):
    for page in site.glob("**/*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text), page.name
        assert not re.search(r'<link[^>]+rel="(?:stylesheet|preload)"[^>]+href="(?:https?:)?//', text), page.name
        for target in re.findall(r'<a [^>]*href="([^"#?]+)', text):
            if "://" not in target and page.name != "404.html":
                assert (page.parent / target).is_file(), f"{page.name}: {target}"
    assert (site / "search/search_index.js").read_text(encoding="utf-8").startswith("var __index = ")
    assert "iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_docstrings_become_markdown():
    text = """A pair :math:`A u
    = u` of :class:`~a.b.C` and :func:`a.f`.

.. math:: x = \\frac12,
          \\quad y

Parameters
----------
k
    How many.

After the list ``x`` : prose,
over two lines.

Attributes
----------
values : (k,), ordered
    and more
"""
    expected = """A pair $A u = u$ of `C` and `a.f`.

$$
x = \\frac12, \\quad y
$$

Parameters
----------
k
    How many.

Notes
-----
After the list ``x`` : prose,
over two lines.

Attributes
----------
values
    (k,), ordered
    and more"""
    found = module("docstrings").markdown(text)
    assert re.sub(r"\n{3,}", "\n\n", found) == expected


def test_explained_messages_are_the_ones_that_the_code_gives():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lib").glob("**/*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines is one
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) > 10
    for heading in headings:
        for part in heading.split("…"):
            assert part.strip() in source, f"no message has {part!r}"
