"""Draws the gallery's figures again from the tables that are kept with them, when the code that draws has changed.

A folder of kept results (one below ``results/reference``, or ``docs/figures`` for the default study's) says in
``figures.yaml`` from which of its tables each figure is drawn: the table's label, and one or several CSV files. Beside
the pictures lies ``drawn.json``: for each the function and the hash of its code. Tests compare it with the code.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import yaml

from curvspace.cli import common
from curvspace.errors import UserError
from papers import registry
from papers.common import ledger
from papers.common.study import Artefact
from papers.common.style import Style, save
from workflow import settings
from workflow.invalidation import Code
from workflow.reference import whole

ROOT = Path(__file__).resolve().parents[1]
STAMP = "drawn.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m workflow.redraw", description=__doc__)
    parser.add_argument("ids", nargs="*", help="figures to draw (default: those whose code has changed)")
    parser.add_argument("--all", action="store_true", help="draw all of them")
    parser.add_argument(
        "--keep", type=Path, help="results of a default run, whose tables docs/figures is to keep and be drawn from"
    )
    options = parser.parse_args(arguments)
    with common.one_line_errors("redraw"):
        if options.keep:
            keep(options.keep)
        code = Code(ROOT / "lib", ROOT)
        for folder in folders():
            renewed = options.keep is not None and folder == ROOT / "docs"
            for name in drawable(folder):
                stale = renewed or stamp(folder).get(name, {}).get("code") != current(code, folder, name)
                if name in options.ids or options.all or (stale and not options.ids):
                    draw(folder, name, code)
                    print(f"{folder.relative_to(ROOT)}: {name}")


def keep(results: Path) -> None:
    """Keep the tables of all figures that a default run has finished and no reference run has, to be drawn from."""
    docs = ROOT / "docs"
    known = {name for folder in folders() if folder != docs for name in stamp(folder)}
    listed = drawable(docs) if (docs / "figures.yaml").is_file() else {}
    for artefact in registry.declare(settings.whole(settings.files([ROOT / "config.yaml"]))).artefacts:
        whole_set = all((results / table).is_file() for table in artefact.files)
        if artefact.kind != "figure" or artefact.id in known or not whole_set:
            continue
        for table in artefact.files:
            target = docs / "figures" / "tables" / f"{table}.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(gzip.compress((results / table).read_bytes(), mtime=0))
        listed[artefact.id] = {
            label: [f"figures/tables/{source.table}.gz" for source in sources]
            for label, sources in artefact.inputs.items()
        }
    head = "# From which tables each figure of the default study is drawn (python -m workflow.redraw).\n"
    (docs / "figures.yaml").write_text(head + yaml.safe_dump(listed, allow_unicode=True), encoding="utf-8")


def folders() -> list[Path]:
    """All folders with kept figures."""
    listed = [*sorted((ROOT / "results" / "reference").glob("*/figures.yaml")), ROOT / "docs" / "figures.yaml"]
    return [file.parent for file in listed if file.is_file()]


def drawable(folder: Path) -> dict[str, dict[str, Any]]:
    """Figure -> label -> CSV files."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((folder / "figures.yaml").read_text(encoding="utf-8"))
    return found


def stamp(folder: Path) -> dict[str, dict[str, str]]:
    """By which code the pictures of a folder were drawn."""
    file = folder / "figures" / STAMP
    found: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def current(code: Code, folder: Path, name: str) -> str:
    """The hash of the code that would draw a figure now; empty if it has not been drawn by this program yet."""
    function = stamp(folder).get(name, {}).get("function")
    return code.hash("papers.cli.figure", function) if function else ""


def draw(folder: Path, name: str, code: Code) -> None:
    """Draw one figure and note by which code."""
    artefact, style = declared(folder, name)
    tables = kept(folder, name)
    function = common.load_function(artefact.function)
    options = dict(artefact.spec)
    if "order" in options:  # a piece may have run some of the networks only
        options["order"] = [label for label in options["order"] if label in tables]
    (folder / "figures").mkdir(exist_ok=True)
    with style.applied(), TemporaryDirectory() as place:
        figure, drawn = function(tables, style, **options)
        for file in save(figure, drawn, Path(place) / f"{name}.csv", style.dpi):
            target = folder / "figures" / file.name
            if file.suffix == ".png" or (target.is_file() and target not in sources(folder, name)):
                shutil.copyfile(file, target)
    entry = {"function": artefact.function, "code": code.hash("papers.cli.figure", artefact.function)}
    text = json.dumps(dict(sorted({**stamp(folder), name: entry}.items())), indent=1)
    (folder / "figures" / STAMP).write_text(text + "\n", encoding="utf-8")


def kept(folder: Path, name: str) -> dict[str, pd.DataFrame]:
    """The tables of a figure by label: of one CSV or several, or ``{csv: …, where: …, order: …}``.

    ``where``: column -> the value of its rows. ``order``: column -> values in the order in which they are drawn.
    """
    found = {}
    for label, block in _blocks(folder, name).items():
        paths, where = _paths(folder, block), block.get("where", {})
        if not paths:
            raise UserError(f"{folder / 'figures.yaml'}: {name} has no table {block['csv']}")
        table = ledger.joined([pd.read_csv(path) for path in paths])
        table = table[(table[list(where)] == list(where.values())).all(axis=1)]
        for column, order in block.get("order", {}).items():
            table = table.sort_values(column, key=lambda values, order=order: values.map(order.index), kind="stable")
        found[label] = table
    return found


def declared(folder: Path, name: str) -> tuple[Artefact, Style]:
    """The figure as the studies declare it with the config of the kept run, and its style."""
    config: Mapping[str, Any] = (
        whole(folder) if (folder / "config.yaml").is_file() else settings.whole(settings.files([ROOT / "config.yaml"]))
    )
    for artefact in registry.declare(config).artefacts:
        if artefact.id == name:
            return artefact, Style(**config.get("style", {}))
    raise UserError(f"{folder / 'figures.yaml'} names {name}, which its config does not make")


def sources(folder: Path, name: str) -> set[Path]:
    """The files that a figure is drawn from."""
    return {path for block in _blocks(folder, name).values() for path in _paths(folder, block)}


def _blocks(folder: Path, name: str) -> dict[str, Mapping[str, Any]]:
    entries = drawable(folder)[name].items()
    return {label: entry if isinstance(entry, Mapping) else {"csv": entry} for label, entry in entries}


def _paths(folder: Path, block: Mapping[str, Any]) -> list[Path]:
    listed = [block["csv"]] if isinstance(block["csv"], str) else block["csv"]
    return [path for pattern in listed for path in sorted(folder.glob(pattern))]


if __name__ == "__main__":
    main()
