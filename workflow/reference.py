"""One ledger of all reference results: for each claim the verdict at the largest scale that was run.

A reference piece is a folder below ``results/reference`` with ``config.yaml``, laid over the project's, and the tables
of that run that were kept, each where the run had it (``tables/…``, ``figures/…``, ``measures/…``, ``runs/…``). Adding
a piece is adding its folder. Written are ``claims.csv`` and ``claims.md``; beside the verdict stands that
of the default run, the piece ``default``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from snakemake.utils import update_config

from curvspace.cli import common
from curvspace.files import writing
from papers import registry
from papers.common import claims, ledger, tables
from papers.common.outcomes import HOLDS, UNTESTED
from workflow import settings

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "id",
    "paper",
    "statement",
    "reference",
    "measured",
    "seeds",
    "scale",
    "piece",
    "verdict",
    "default",
    "needs",
)

Size = tuple[bool, float, int, int]
"""(has a verdict, size of the run, parts of the claim's scale that were run, seeds): what makes a row the larger."""
NONE: Size = (False, 0.0, 0, 0)
DEFAULT = "default"
"""The piece that is a run of the default study."""
HEAD = """Each verdict is that of the largest scale that was run; the last column has the default run's.

**What a verdict needs.** A claim about a number that a paper prints, or about whole training runs on whole data sets,
is judged at that scale alone. A claim about a structure or a phenomenon (the gradient moves into few directions, both
methods diverge, one overtakes the other) is judged on the paper's data set or a part of it, and on its kind of
network, be it narrower; "scale" says which data, how many examples, which width and how many epochs, and the verdict
is about that scale. Where a network that was run at both scales shows that the smaller one itself moves the number
(B1, B11), the larger is asked for. "Not tested" means that what the claim is about was not run: another data set,
another kind of network, fewer seeds than it asks for."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m workflow.reference", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "reference", help="folder of the pieces")
    options = parser.parse_args(arguments)
    with common.one_line_errors("reference"):
        table = judged(options.folder)
        with writing(options.folder / "claims.csv"):
            table.to_csv(options.folder / "claims.csv", index=False)
            (options.folder / "claims.md").write_text(markdown(table), encoding="utf-8")


def judged(folder: Path) -> pd.DataFrame:
    """The ledger: one row a claim, from the largest scale that gives it a verdict.

    Of equal ones it is the one with most of the claim's data sets and networks, of these the one
    with most seeds, and at last the first by its name.
    """
    found: dict[str, list[tuple[Size, dict[str, Any]]]] = {}
    for piece in sorted(file.parent for file in folder.glob("*/config.yaml")):
        for size, row in rows(piece):
            found.setdefault(row["id"], []).append((size, row))
    chosen = []
    for claim in ledger.load(registry.claim_files().values()):
        nothing = ledger.row(claim, {}) | {"measured": "no reference piece has its tables", "piece": ""}
        row = max(found.get(claim.id, []), key=lambda pair: pair[0], default=(NONE, nothing))[1]
        default = [other["verdict"] for _, other in found.get(claim.id, []) if other["piece"] == DEFAULT]
        chosen.append(row | {"default": "" if row["piece"] == DEFAULT else "".join(default)})
    return pd.DataFrame(chosen, columns=list(COLUMNS))


def rows(piece: Path) -> Iterator[tuple[Size, dict[str, Any]]]:
    """(size, ledger row) of each claim whose tables a piece has."""
    config = whole(piece)
    study = registry.declare(config)
    entries = {file: ledger.entries(file) for file in registry.claim_files().values()}
    spec = claims.bind([entry for part in entries.values() for entry in part], study, config)
    for claim in ledger.load(entries):
        paths = {
            label: [path for source in sources for path in spec["sources"].get(source, ["?"])]
            for label, sources in claim.sources.items()
        }
        if not all((piece / path).is_file() for part in paths.values() for path in part):
            continue
        read = tables.read(piece, paths)
        models = spec["models"].get(claim.id, [])
        missing = absent(models, read)
        parts = spec["parts"].get(claim.id, {})
        seen = present(parts, ledger.about(read.values(), claim.options.get("where", {})))
        examples = {model: n for model, n in spec["examples"].get(claim.id, {}).items() if model not in missing}
        scale = claims.in_words(seen, examples)
        words = spec["words"].get(claim.id, {})
        short = f"no {' or '.join(words.get(name, name) for name in missing)}" if missing else ""
        row = ledger.row(claim, read, scale, spec["short"].get(claim.id, "") or short, words=words)
        if row["verdict"] == HOLDS and not models and (unseen := [part for part in parts if part not in seen]):
            row |= {"verdict": UNTESTED, "needs": f"{claim.needs} (here: no {' or '.join(unseen)})"}
        size = spec["size"].get(claim.id, 0.0)
        yield (row["verdict"] != UNTESTED, size, len(seen), row["seeds"]), row | {"piece": piece.name}


def absent(models: Iterable[str], read: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which networks of a claim the kept tables have no row of: a piece may have run some of them only."""
    named = [table["model"] for table in read.values() if "model" in table]
    return sorted(set(models) - set(pd.concat(named))) if named else []


def present(parts: Mapping[str, list[tuple[str, str]]], about: Sequence[pd.DataFrame]) -> list[str]:
    """The parts of a claim's scale of whose data set and network there is a row; all, if no table names both."""
    named = [table[["dataset", "model"]].drop_duplicates() for table in about if {"dataset", "model"} <= set(table)]
    there = {tuple(pair) for table in named for pair in table.to_numpy().tolist()}
    return [part for part, pairs in parts.items() if not named or there.intersection(pairs)]


def whole(piece: Path) -> dict[str, Any]:
    """The config of a piece, laid over the project's, with all settings in it."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    update_config(config, yaml.safe_load((piece / "config.yaml").read_text(encoding="utf-8")))
    return settings.laid_over(config)


def markdown(table: pd.DataFrame) -> str:
    """The ledger for reading, one section a paper."""
    lines = ["# The claims, by the reference results", "", "Made by `make reference-claims`.", ""]
    lines += [ledger.summary(table), "", HEAD, ""]
    for paper, part in table.groupby("paper", sort=False):
        lines += [f"## Paper {paper}" if paper != "X" else "## Our own", ""]
        lines += ["| | statement | paper | measured | seeds | scale | verdict | default scale |", "|" + " --- |" * 8]
        for row in ledger.records(part):
            verdict = row["verdict"] if not row["needs"] else f"{row['verdict']}; needs {row['needs']}"
            scale = f"{row['scale']} ([{row['piece']}]({row['piece']}/README.md))" if row["piece"] else ""
            cells = (row["id"], row["statement"], row["reference"], row["measured"], row["seeds"], scale, verdict)
            lines.append("| " + " | ".join(ledger.plain(cell) for cell in (*cells, row["default"])) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
