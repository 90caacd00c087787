"""Every Python example of the documentation runs, page by page, in the order in which it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": f"docs_{page.stem}"}
    text = page.read_text(encoding="utf-8")
    for code in blocks(page, "python"):
        line = text[: text.index(code)].count("\n")
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_readme_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Words as printed; numbers to 2 %, since the last digits (residuals, errors) are the machine's."""
    (code,), (said,) = blocks(README, "python"), blocks(README, "text")
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    printed, said = capsys.readouterr().out.split(), said.split()
    assert len(printed) == len(said)
    for got, word in zip(printed, said, strict=True):
        number = re.fullmatch(r"[0-9.]+(e[+-]\d+)?", word)
        assert float(got) == pytest.approx(float(word), rel=0.02, abs=1e-3) if number else got == word


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / target).exists(), target
    prose = re.sub(r"```.*?```|^\|.*$|^#.*$", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    for sentence in re.split(r"[.?:;](?=\s)|\n\n|\n- ", prose):
        assert len(sentence.split()) <= 25, sentence


@pytest.mark.parametrize("page", [p for p in [README, *PAGES] if blocks(p, "yaml")], ids=lambda p: p.stem)
def test_yaml_is_readable(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)


def test_commands_exist() -> None:
    """Make targets and commands that the pages name are there."""
    makefile = (ROOT / "Makefile").read_text()
    for page in [README, *PAGES]:
        for target in re.findall(r"(?<!\w)make ([a-z][a-z-]*)", "\n".join(blocks(page, "bash") + blocks(page, "sh"))):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
        for package, stage in re.findall(r"(curvspace|papers)\.cli\.([a-z]+)", page.read_text()):
            assert (ROOT / "lib" / package / "cli" / f"{stage}.py").is_file(), f"{page.name}: {package} {stage}"


def test_example_claim_is_the_shipped_one() -> None:
    (shown,) = yaml.safe_load(blocks(ROOT / "docs/claims.md", "yaml")[0])
    shipped = {claim["id"]: claim for claim in yaml.safe_load((ROOT / "lib/papers/a/claims.yaml").read_text())}
    assert shown == shipped[shown["id"]]


def test_pages_are_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"(?:reference/)?[\w-]+\.md", text))
    assert {p.name for p in PAGES} - {"answer.md"} == {name for name in named if not name.startswith("reference/")}


def test_figures_of_the_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            piece = re.fullmatch(r"gallery/(\w+)/([\w-]+\.png)", target)  # the site takes these from the results
            place = ROOT / "results/reference" / piece[1] / "figures" / piece[2] if piece else page.parent / target
            assert place.is_file(), f"{page.name}: {target}"


def test_site_needs_no_network() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config
    assert not re.search(r"https?://", config)


def test_gallery_has_the_figures_that_were_made_with_their_captions(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
    finally:
        sys.path.pop(0)
    for name in ("results/reference/d-mnist/figures/D-F1.png", "docs/figures/A-F10.png", "docs/figures/A-F2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "results/reference/d-mnist/README.md").write_text("# Paper D on MNIST\n\nMore.\n")
    page = hooks.gallery(hooks.pictures(tmp_path))
    assert re.findall(r"^##+ (.*)$", page, re.MULTILINE) == [
        *("Paper D on MNIST", "D-F1", "The default study", "A-F2", "A-F10"),
    ]
    assert "![D-F1](gallery/d-mnist/D-F1.png)" in page
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "captions.yaml").write_text("X: |\n  The ``loss`` by :math:`x^2`.\n")
    assert hooks.caption("X", tmp_path) == "The `loss` by `x^2`."
    assert hooks.caption("Y", tmp_path) == ""
