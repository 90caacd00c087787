"""Build hook of the documentation: the gallery shows the figures that were really made, and no others.

Figures come from ``results/reference/*/figures/*.png`` (tracked results of full-scale runs) and ``docs/figures/*.png``
(copies of the default study's) or, where there are none, ``results/figures`` (the last run here); each has the
caption that the pipeline's report uses.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from papers.common import ledger, pages

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ROOT / "lib" / "papers"
PLACE = "<!-- figures -->"


def pictures(root: Path = ROOT) -> dict[str, Path]:
    """Place in the site -> picture: the reference runs', then the default study's of which there is no reference."""
    reference = sorted((root / "results" / "reference").glob("**/figures/*.png"))
    kept, last = (sorted((root / folder).glob("*.png")) for folder in ("docs/figures", "results/figures"))
    found = {}
    for path in reference:
        inner = path.relative_to(root / "results" / "reference").as_posix()
        found[f"gallery/{inner.replace('/figures/', '/')}"] = path
    shown = {path.name for path in reference}
    return found | {f"gallery/default/{path.name}": path for path in kept or last if path.name not in shown}


def made(folder: Path) -> str:
    """On which machine and from which commit the results of a reference folder come; empty where it is not known."""
    record = folder / "provenance.json"
    if not record.is_file():
        return ""
    known = json.loads(record.read_text(encoding="utf-8"))
    commits = known.get("commit") or known.get("code") or "unknown"
    named = ", ".join(f"`{one}`" for one in ([commits] if isinstance(commits, str) else commits))
    machine = "; ".join(dict.fromkeys(str(known[key]) for key in ("device", "cpu") if key in known))
    return f"Measured at commit {named} on: {machine}."


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the page on paper A's open question into the navigation where it has been written."""
    if config.nav and (ROOT / "docs" / "answer.md").is_file():
        config.nav.insert(1, {"The answer": "answer.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the pictures where the gallery looks for them; leave out what is no page."""
    for place, path in pictures().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    files.append(File.generated(config, "ledger.html", content=ledger_page()))
    for file in [f for f in files if f.src_uri.endswith(".py") or f.src_uri.startswith("figures/")]:
        files.remove(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Fill in the gallery."""
    return markdown.replace(PLACE, gallery(pictures())) if PLACE in markdown else markdown


def ledger_page(root: Path = ROOT) -> str:
    """The ledger of the reference results, to filter."""
    table = pd.read_csv(root / "results" / "reference" / "claims.csv", keep_default_na=False)
    title = "The claims, by the reference results"
    return pages.ledger_page(ledger.records(table), ledger.summary(table), title)


def gallery(found: dict[str, Path]) -> str:
    """One section a run (a folder of figures), one heading a figure, in the papers' order."""
    lines: list[str] = []
    for run in dict.fromkeys(place.rpartition("/")[0] for place in found):
        first = next(path for place, path in found.items() if place.rpartition("/")[0] == run)
        lines += [f"## {title(first.parents[1])}", "", made(first.parents[1]), ""]
        inside = [place for place in found if place.rpartition("/")[0] == run]
        for place in sorted(inside, key=_order):
            name = Path(place).stem
            lines += [f"### {name}", "", f"![{name}]({place})", "", caption(name), ""]
    return "\n".join(lines) or "No figure has been made yet: `make run` makes them."


def title(piece: Path) -> str:
    """What a folder of reference results calls itself: the first line of its README."""
    readme = piece / "README.md"
    return (
        readme.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") if readme.is_file() else "The default study"
    )


def caption(name: str, folder: Path = PAPERS) -> str:
    """The report's caption of a figure as Markdown; empty if it has none."""
    for file in folder.glob("*/captions.yaml"):
        if text := yaml.safe_load(file.read_text(encoding="utf-8")).get(name):
            return re.sub(r":math:`([^`]*)`", r"`\1`", text.replace("``", "`")).strip()
    return ""


def _order(place: str) -> list[Any]:
    """A-F2 before A-F10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", Path(place).stem)]
