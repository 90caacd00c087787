"""The claims ledger: all tables of the study in, one row a claim out, as CSV, Markdown and HTML.

The spec has ``sources`` (CSV files below ``--results`` by source) and by claim ``scale`` (what was run, in words),
``short`` (why this scale is too small for a verdict), ``link`` (its figure) and ``words``
(names for a reader); the claims themselves stand in ``--claims``. A claim whose source is not in the
spec is not tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from curvspace.cli import common
from curvspace.files import write_record, writing
from papers import registry
from papers.common import ledger, pages, tables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("claims", __doc__ or "", "papers")
    parser.add_argument(
        "--claims",
        type=Path,
        nargs="+",
        default=list(registry.claim_files().values()),
        help="files of claims (default: those of all papers)",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds the tables")
    parser.add_argument("--out", type=Path, required=True, help="path of the CSV; all else stands beside it")
    options = parser.parse_args(arguments)
    with common.one_line_errors("claims"):
        make(options.spec, options.code, options.claims, options.results, options.out)


def make(spec: dict, code: str, files: Sequence[Path], results: Path, out: Path) -> None:
    """Judge every claim, and save the ledger with its record."""
    claims = ledger.load(files)
    read = tables.read(results, {path: [path] for paths in spec["sources"].values() for path in paths})
    rows = []
    for claim in claims:
        known = {
            label: ledger.joined([read[path] for source in sources for path in spec["sources"][source]])
            for label, sources in claim.sources.items()
            if all(source in spec["sources"] for source in sources)
        }
        notes = {key: spec.get(key, {}).get(claim.id, "") for key in ("scale", "short", "link")}
        rows.append(ledger.row(claim, known, **notes, words=spec.get("words", {}).get(claim.id)))
    judged = ledger.table(rows)
    outputs = [out.with_suffix(suffix) for suffix in (".csv", ".md", ".html")]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        judged.to_csv(outputs[0], index=False)
        outputs[1].write_text(ledger.markdown(judged), encoding="utf-8")
        outputs[2].write_text(pages.ledger_page(ledger.records(judged), ledger.summary(judged)), encoding="utf-8")
    made_from = tables.digests(results, spec["sources"])
    write_record(out.with_suffix(".run.json"), common.provenance(spec, code), outputs, made_from)


if __name__ == "__main__":
    main()
