"""One figure: tables in, a picture (PNG, PDF) and the CSV it was drawn from out.

The spec has ``function`` (``module:function``), ``inputs`` (CSV files below ``--results`` by label), ``options``
(the function's keyword arguments) and ``style`` (the config's block of that name).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from curvspace.cli import common
from curvspace.errors import UserError
from curvspace.files import write_record, writing
from papers.common import tables
from papers.common.style import Style, save


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("figure", __doc__ or "", "papers")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds the tables")
    parser.add_argument("--out", type=Path, required=True, help="path of the CSV; all else stands beside it")
    options = parser.parse_args(arguments)
    with common.one_line_errors("figure"):
        draw(options.spec, options.code, options.results, options.out)


def draw(spec: dict, code: str, results: Path, out: Path) -> None:
    """Draw and save the figure, with its record."""
    function = common.load_function(spec["function"])
    style = Style(**spec.get("style", {}))
    with style.applied():
        figure, drawn = _checked(function(tables.read(results, spec["inputs"]), style, **spec.get("options", {})), spec)
        with writing(out):
            save(figure, drawn, out, style.dpi)
    outputs = [out.with_suffix(suffix) for suffix in (".csv", ".pdf", ".png")]
    made_from = tables.digests(results, spec["inputs"])
    write_record(out.with_suffix(".run.json"), common.provenance(spec, code), outputs, made_from)


def _checked(result: object, spec: dict) -> tuple[Figure, pd.DataFrame]:
    match result:
        case (Figure() as figure, pd.DataFrame() as drawn):
            return figure, drawn
    raise UserError(f"{spec['function']} must return (Figure, DataFrame drawn), and returned {type(result).__name__}")


if __name__ == "__main__":
    main()
