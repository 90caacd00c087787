"""One table: tables in, one table out as CSV (all digits), Markdown, LaTeX and HTML (four digits).

The spec has ``function`` (``module:function``), ``inputs`` (CSV files below ``--results`` by label), ``options``
(the function's keyword arguments) and ``title``.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from curvspace.cli import common
from curvspace.errors import UserError
from curvspace.files import write_record, writing
from papers.common import tables

LATEX = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\^{}"}
LATEX |= {"±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$", "×": r"$\times$", "−": "$-$", "η": r"$\eta$", "λ": r"$\lambda$"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("table", __doc__ or "", "papers")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds the tables")
    parser.add_argument("--out", type=Path, required=True, help="path of the CSV; all else stands beside it")
    options = parser.parse_args(arguments)
    with common.one_line_errors("table"):
        make(options.spec, options.code, options.results, options.out)


def make(spec: dict, code: str, results: Path, out: Path) -> None:
    """Make and save the table, with its record."""
    table = common.load_function(spec["function"])(tables.read(results, spec["inputs"]), **spec.get("options", {}))
    if not isinstance(table, pd.DataFrame):
        raise UserError(f"{spec['function']} must return a DataFrame, and returned {type(table).__name__}")
    forms = {".md": markdown, ".tex": latex, ".html": html_page}
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(out, index=False)
        for suffix, render in forms.items():
            out.with_suffix(suffix).write_text(render(table, spec.get("title", "")), encoding="utf-8")
    outputs = [out, *(out.with_suffix(suffix) for suffix in forms)]
    made_from = tables.digests(results, spec["inputs"])
    write_record(out.with_suffix(".run.json"), common.provenance(spec, code), outputs, made_from)


def cell(value: object) -> str:
    """A value as a reader wants it: four significant digits, nothing for a missing one."""
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(table: pd.DataFrame, quote: Callable[[str], str]) -> list[list[str]]:
    """Header and body as quoted text."""
    body = [[quote(cell(value)) for value in row] for row in table.astype(object).itertuples(index=False)]
    return [[quote(str(name)) for name in table.columns], *body]


def markdown(table: pd.DataFrame, title: str = "") -> str:
    """A table in GitHub's Markdown; numbers to the right."""
    header, *body = _rows(table, lambda text: text.replace("|", "\\|").replace("\n", " "))
    rule = ["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in table.dtypes]
    lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *body)]
    return "\n".join([*([f"**{title}**", ""] if title else []), *lines, ""])


def latex(table: pd.DataFrame, title: str = "") -> str:
    """A ``tabular`` with the rules of the booktabs package; the title is a comment before it."""
    header, *body = _rows(table, lambda text: "".join(LATEX.get(c, c) for c in text))
    columns = "".join("r" if pd.api.types.is_numeric_dtype(kind) else "l" for kind in table.dtypes)
    lines = [" & ".join(row) + r" \\" for row in (header, *body)]
    head = [f"% {title}"] if title else []
    parts = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*head, *parts, r"\end{tabular}", ""])


def html_page(table: pd.DataFrame, title: str = "") -> str:
    """A page of its own, for the report."""
    header, *body = _rows(table, html.escape)
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]
    head = "".join(f"<th>{text}</th>" for text in header)
    rows = [
        "".join(f'<td class="{"n" if number else "t"}">{text}</td>' for text, number in zip(row, numeric, strict=True))
        for row in body
    ]
    style = (
        "body{font:14px sans-serif;margin:1.5em}table{border-collapse:collapse}th,td{padding:.3em .8em;text-align:left}"
        "thead{border-top:2px solid;border-bottom:1px solid}tbody{border-bottom:2px solid}.n{text-align:right}"
    )
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{style}</style></head><body><h2>{html.escape(title)}</h2>",
            f"<table><thead><tr>{head}</tr></thead><tbody>",
            *(f"<tr>{row}</tr>" for row in rows),
            "</tbody></table></body></html>",
            "",
        ]
    )


if __name__ == "__main__":
    main()
