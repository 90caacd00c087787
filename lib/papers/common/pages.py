"""HTML pages that stand alone: the claims ledger to filter, and the front page of the report. No outside resources.

Both are read from a file, from a site, and inside Snakemake's report, which shows a page in a frame without an
address of its own: there a link to another file leads nowhere, so the script takes such links out.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papers.common.outcomes import UNTESTED, VERDICTS

COLOURS = {"holds": "#d5efd5", "fails": "#f6d5d3", "inconclusive": "#fbefc5", UNTESTED: "#e8e8e8"}
PAPERS = {
    "A": "paper A: class-gradient Newton",
    "B": "paper B: tiny subspace",
    "C": "paper C: CurveBall",
    "D": "paper D: negative curvature",
    "X": "our own",
}
SHORT = 110
"""Characters of a cell; what is longer is opened by a tap."""

STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:1em;max-width:75em;color:#222;background:#fff;"
    "overflow-wrap:break-word}h1{font-size:1.5em;margin:.2em 0}h2{font-size:1.15em;margin:0 0 .3em}"
    "img{max-width:100%;height:auto}a{color:#1a4fa0}summary{cursor:pointer}summary::marker{color:#777}"
    "table{border-collapse:collapse;width:100%}th,td{padding:.4em .6em;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #ddd}thead th{border-bottom:2px solid #222;position:sticky;top:0;background:#fff}"
    ".v{padding:.1em .5em;border-radius:.6em;white-space:nowrap}"
    + "".join(f".v{i}{{background:{COLOURS[verdict]}}}" for i, verdict in enumerate(VERDICTS))
    + ".bar{display:flex;flex-wrap:wrap;gap:.6em;margin:.8em 0;align-items:center}"
    ".bar select,.bar input{font:inherit;padding:.25em;max-width:100%}"
    ".cards{display:grid;gap:1.2em;grid-template-columns:repeat(auto-fill,minmax(min(100%,26em),1fr))}"
    ".cards section{border:1px solid #ddd;border-radius:.5em;padding:.9em}.cards ul{padding-left:1.1em}"
    ".small{color:#555;font-size:.88em}"
    "@media(max-width:50em){.ledger thead{display:none}.ledger tr{display:block;border:1px solid #ccc;"
    "border-radius:.5em;margin:0 0 .8em;padding:.3em}.ledger td{display:block;border:0;padding:.15em .4em}"
    ".ledger td:empty{display:none}.ledger td[data-name]::before{content:attr(data-name)': ';color:#666}"
    "tr[hidden]{display:none!important}}"
)
LINKS = (
    "if(!/^(file|https?):$/.test(location.protocol))for(const a of document.querySelectorAll('a[href]'))"
    "if(!a.getAttribute('href').startsWith('#'))a.replaceWith(...a.childNodes);"
)
FILTER = """
const rows=[...document.querySelectorAll('.ledger tbody tr')];
const pick=name=>document.getElementById(name).value;
function filter(){
  const words=pick('words').toLowerCase().split(/\\s+/);
  let shown=0;
  for(const row of rows){
    const text=row.textContent.toLowerCase();
    row.hidden=!((!pick('paper')||row.dataset.paper===pick('paper'))
      &&(!pick('verdict')||row.dataset.verdict===pick('verdict'))&&words.every(word=>text.includes(word)));
    shown+=!row.hidden;
  }
  document.getElementById('shown').textContent=shown+' of '+rows.length+' shown';
}
for(const name of ['paper','verdict','words'])document.getElementById(name).addEventListener('input',filter);
filter();
"""
CELLS = {
    "where": "where",
    "reference": "the paper has",
    "measured": "measured",
    "seeds": "seeds",
    "scale": "scale",
}
"""Columns of the ledger beside identity, statement and verdict, with what a reader calls them."""


@dataclass(frozen=True)
class Picture:
    """One picture of the front page: a question, the figure that is about it, and the claims that answer it.

    file: the PNG, which goes into the page. link: where it lies as seen from the page.
    """

    question: str
    figure: str
    file: Path
    link: str
    claims: Sequence[str] = ()
    caption: str = ""


def ledger_page(rows: Sequence[Mapping[str, Any]], summary: str, title: str = "Claims ledger") -> str:
    """The ledger as one page: a row a claim (a card on a phone), filtered by paper, verdict and words."""
    cells = {key: name for key, name in CELLS.items() if all(key in row for row in rows)}
    head = "".join(f"<th>{name}</th>" for name in ("id", "statement", *cells.values(), "verdict"))
    papers = _choices("paper", {str(row["paper"]): PAPERS.get(str(row["paper"]), str(row["paper"])) for row in rows})
    verdicts = _choices("verdict", {verdict: verdict for verdict in VERDICTS})
    body = "\n".join(_row(row, cells) for row in rows)
    return _shell(
        title,
        f'<h1>{title}</h1><p>{html.escape(summary)}</p>\n<div class="bar">{papers}{verdicts}'
        '<input id="words" type="search" placeholder="words" aria-label="words">'
        '<span id="shown" class="small" aria-live="polite"></span></div>\n'
        f'<table class="ledger"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>',
        FILTER,
    )


def front_page(
    pictures: Iterable[Picture], rows: Sequence[Mapping[str, Any]], summary: str, ledger: str = "claims.html"
) -> str:
    """The report's first page: what came out in one line, then a question, its claims and a picture, ten times.

    The pictures are inside the page; ``ledger`` is where the whole ledger lies beside it.
    """
    known = {str(row["id"]): row for row in rows}
    cards = "\n".join(_card(picture, known, ledger) for picture in pictures)
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in found(rows))
    where = f'<a href="{html.escape(ledger)}">The claims ledger</a> has all of them.'
    return _shell(
        "What came out",
        f"<h1>What came out</h1><ul>{lines}</ul>"
        f'<p class="small">{html.escape(summary)} {where}</p>\n<div class="cards">\n{cards}\n</div>',
    )


def found(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence a paper: how many of its statements this run could test, and how many of these held."""
    sentences = []
    for paper in dict.fromkeys(str(row["paper"]) for row in rows):
        own = [row["verdict"] for row in rows if str(row["paper"]) == paper]
        tested = len(own) - own.count(UNTESTED)
        counts = [f"{own.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in own and verdict != UNTESTED]
        came = f"{tested} tested ({', '.join(counts)})" if tested else "none tested at this scale"
        name = PAPERS.get(paper, paper)
        sentences.append(f"{name[:1].upper()}{name[1:]}: {len(own)} statements, {came}.")
    return sentences


def _card(picture: Picture, known: Mapping[str, Mapping[str, Any]], ledger: str) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode()
    answers = "".join(
        f'<li><a href="{html.escape(ledger)}#{html.escape(name)}">{html.escape(name)}</a> '
        f"{_badge(known[name]['verdict'])} {_folded(known[name]['statement'])}"
        f"<div>{_folded(known[name]['measured'])}</div></li>"
        for name in picture.claims
        if name in known
    )
    return (
        f"<section><h2>{html.escape(picture.question)}</h2><ul>{answers}</ul>"
        f'<a href="{html.escape(picture.link)}">'
        f'<img alt="{html.escape(picture.figure)}" src="data:image/png;base64,{data}"></a>'
        f'<p class="small">{html.escape(picture.figure)}. {html.escape(picture.caption)}</p></section>'
    )


def _row(row: Mapping[str, Any], shown: Mapping[str, str]) -> str:
    name = html.escape(str(row["id"]))
    link = row.get("figure", "")
    identity = f'<a href="{html.escape(str(link))}">{name}</a>' if link else name
    cells = "".join(f'<td data-name="{title}">{_folded(row[key])}</td>' for key, title in shown.items())
    needs = f"<div class='small'>{_folded('needs ' + str(row['needs']))}</div>" if row.get("needs") else ""
    return (
        f'<tr id="{name}" data-paper="{html.escape(str(row["paper"]))}" data-verdict="{html.escape(row["verdict"])}">'
        f"<td><b>{identity}</b></td><td>{_folded(row['statement'])}</td>{cells}"
        f"<td>{_badge(row['verdict'])}{needs}</td></tr>"
    )


def _badge(verdict: str) -> str:
    return f'<span class="v v{VERDICTS.index(verdict)}">{html.escape(verdict)}</span>'


def _folded(value: Any) -> str:
    """A cell's text; a long one folded behind its first words."""
    text = " ".join(str(value).split())
    if len(text) <= SHORT:
        return html.escape(text)
    cut = text.rfind(" ", 0, SHORT - 10)
    cut = cut if cut > 0 else SHORT - 10
    first, rest = text[:cut].rstrip(), text[cut:].lstrip()
    return f"<details><summary>{html.escape(first)} …</summary>{html.escape(rest)}</details>"


def _choices(name: str, options: Mapping[str, str]) -> str:
    listed = "".join(
        f'<option value="{html.escape(key)}">{html.escape(text)}</option>' for key, text in options.items()
    )
    return f'<select id="{name}" aria-label="{name}"><option value="">every {name}</option>{listed}</select>'


def _shell(title: str, body: str, script: str = "") -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{body}\n"
        f"<script>{LINKS}{script}</script></body></html>\n"
    )
