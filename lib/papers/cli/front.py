"""The report's front page: the ledger and the chosen figures in, one HTML page with the pictures inside out.

The spec has ``claims`` (the ledger's CSV) and ``pictures``, each with ``question``, ``figure`` (path of its PNG, both
below ``--results``), ``claims`` (their names) and ``caption``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from curvspace.cli import common
from curvspace.files import digest, write_record, writing
from papers.common import ledger, pages


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("front", __doc__ or "", "papers")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds ledger and figures")
    parser.add_argument("--out", type=Path, required=True, help="path of the page")
    options = parser.parse_args(arguments)
    with common.one_line_errors("front"):
        make(options.spec, options.code, options.results, options.out)


def make(spec: dict, code: str, results: Path, out: Path) -> None:
    """Write the page, with its record."""
    judged = pd.read_csv(results / spec["claims"], keep_default_na=False)
    pictures = [
        pages.Picture(
            question=one["question"],
            figure=Path(one["figure"]).stem,
            file=results / one["figure"],
            link=one["figure"],
            claims=one["claims"],
            caption=one["caption"],
        )
        for one in spec["pictures"]
    ]
    page = pages.front_page(pictures, ledger.records(judged), ledger.summary(judged))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    read = [results / name for name in (spec["claims"], *(one["figure"] for one in spec["pictures"]))]
    made_from = {file: digest(file) for file in read}
    write_record(out.with_suffix(".run.json"), common.provenance(spec, code), [out], made_from)


if __name__ == "__main__":
    main()
