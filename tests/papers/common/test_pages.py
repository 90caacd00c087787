"""The ledger's page and the report's front page: all claims on them, whole in themselves, safe with any text."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml

from papers import registry
from papers.cli import front
from papers.common import ledger, pages

LONG = "a statement that goes on " * 20
ROWS = [
    {"id": "A1", "paper": "A", "statement": LONG, "reference": "1", "measured": "<b> & 2", "seeds": 2, "scale": "s"},
    {"id": "B1", "paper": "B", "statement": "short", "reference": "", "measured": "", "seeds": 0, "scale": ""},
]
ROWS = [
    row | {"verdict": verdict, "needs": "", "figure": ""} for row, verdict in zip(ROWS, ("holds", "fails"), strict=True)
]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Tags(HTMLParser):
    """Counts opened and closed tags, and keeps rows and addresses."""

    def __init__(self, page: str):
        super().__init__()
        self.opened: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [str(found[key]) for key in ("href", "src") if key in found]
        if tag == "tr" and "data-paper" in found:
            self.rows.append(found)
        if tag not in ("meta", "input", "img", "br"):
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


def test_the_ledger_page_has_each_claim_with_what_it_is_filtered_by():
    page = pages.ledger_page(ROWS, "2 claims")
    tags = Tags(page)
    assert [(row["id"], row["data-paper"], row["data-verdict"]) for row in tags.rows] == [
        ("A1", "A", "holds"),
        ("B1", "B", "fails"),
    ]
    assert tags.opened == []
    head = re.findall("<th>(.*?)</th>", page)
    assert len(head) == page.split("<tbody>")[1].split("</tr>")[0].count("<td")
    assert "&lt;b&gt; &amp; 2" in page
    assert "width=device-width" in page


def test_a_long_cell_is_folded_and_loses_no_word():
    page = pages.ledger_page(ROWS, "")
    first, rest = re.search("<summary>(.*?) …</summary>(.*?)</details>", page).groups()
    assert f"{first} {rest}".split() == LONG.split()
    assert len(first) < pages.SHORT


def test_columns_that_a_ledger_does_not_have_are_not_there():
    rows = [{key: value for key, value in row.items() if key != "scale"} for row in ROWS]
    assert "<th>scale" not in pages.ledger_page(rows, "")


@pytest.mark.parametrize("verdicts", [("holds", "fails"), ("not tested at this scale",) * 2])
def test_the_front_page_counts_and_shows_the_pictures(tmp_path: Path, verdicts):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "A-F1.png").write_bytes(PIXEL)
    rows = [row | {"verdict": verdict} for row, verdict in zip(ROWS, verdicts, strict=True)]
    pd.DataFrame(rows, columns=list(ledger.COLUMNS)).to_csv(tmp_path / "claims.csv", index=False)
    picture = {"question": "Why?", "figure": "figures/A-F1.png", "claims": ["B1", "A1"], "caption": "x < y"}
    spec = {"claims": "claims.csv", "pictures": [picture]}
    out = tmp_path / "front.html"
    front.main(["--spec", json.dumps(spec), "--results", str(tmp_path), "--out", str(out)])
    page = out.read_text()
    tags = Tags(page)
    assert tags.opened == []
    assert base64.b64encode(PIXEL).decode() in page
    assert page.index("claims.html#B1") < page.index("claims.html#A1")
    files = [address.partition("#")[0] for address in tags.addresses if not address.startswith("data:")]
    assert set(files) <= {"claims.html", "figures/A-F1.png"}
    tested = sum(verdict != "not tested at this scale" for verdict in verdicts)
    assert page.count("1 tested") == tested
    assert json.loads((tmp_path / "front.run.json").read_text())["outputs"]


def test_each_picture_that_a_study_puts_first_is_there_and_its_claims_too():
    study = {name: {} for name in registry.folders()}
    chosen = registry.pictures({"studies": study})
    named = {claim.id for claim in ledger.load(registry.claim_files().values())}
    captions = [yaml.safe_load((f / "captions.yaml").read_text()) for f in registry.folders().values()]
    figures = {id for part in captions for id in part}
    assert len(chosen) == 10
    for one in chosen:
        assert one["figure"] in figures
        assert set(one["claims"]) <= named
    assert registry.pictures({"studies": {name: {"enabled": False} for name in study}}) == []
