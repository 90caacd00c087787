"""No figure of the gallery is older than the code that draws it; kept tables draw their figures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lib")]

from workflow import redraw  # noqa: E402
from workflow.invalidation import Code  # noqa: E402

KEPT = [(folder, name) for folder in redraw.folders() for name in redraw.drawable(folder)]


@pytest.fixture(scope="module")
def code() -> Code:
    return Code(ROOT / "lib", ROOT)


def test_every_picture_of_the_gallery_says_by_which_code_it_was_drawn(code):
    reference = (ROOT / "results" / "reference").glob("*/figures/*.png")
    pictures = [*reference, *(ROOT / "docs" / "figures").glob("*.png")]
    assert len(pictures) > 30
    for picture in pictures:
        stamp = redraw.stamp(picture.parents[1]).get(picture.stem)
        assert stamp is not None, f"{picture}: python -m workflow.redraw"
        if "note" not in stamp:
            hashed = code.hash("papers.cli.figure", stamp["function"])
            assert stamp["code"] == hashed, f"{picture} is older than its code: python -m workflow.redraw"


def test_a_picture_without_its_tables_says_why():
    for folder in redraw.folders():
        for name, stamp in redraw.stamp(folder).items():
            assert name in redraw.drawable(folder) or stamp.get("note"), f"{folder}: {name}"


@pytest.mark.parametrize(("folder", "name"), KEPT, ids=[f"{folder.name}-{name}" for folder, name in KEPT])
def test_the_tables_of_a_figure_are_there(folder, name):
    assert all(len(table) for table in redraw.kept(folder, name).values())


def test_a_change_of_the_code_draws_again_and_keeps_the_csv(tmp_path, monkeypatch, capsys):
    piece = tmp_path / "results" / "reference" / "piece"
    piece.mkdir(parents=True)
    source = ROOT / "results" / "reference" / "paper_a_spectrum"
    for name in ("figures/A-F3.csv", "config.yaml"):
        (piece / Path(name).name).write_bytes((source / name).read_bytes())
    (piece / "figures.yaml").write_text(yaml.safe_dump({"A-F3": {"measure": "A-F3.csv"}}))
    before = (piece / "A-F3.csv").read_bytes()
    monkeypatch.setattr(redraw, "folders", lambda: [piece])
    redraw.draw(piece, "A-F3", Code(ROOT / "lib", ROOT))
    stamp = json.loads((piece / "figures" / redraw.STAMP).read_text())
    assert stamp["A-F3"]["function"] == "papers.a.figures:top_eigenvalues"
    assert (piece / "figures" / "A-F3.png").stat().st_size > 1000
    assert (piece / "A-F3.csv").read_bytes() == before
    monkeypatch.setattr(redraw, "ROOT", tmp_path)
    monkeypatch.setattr(redraw, "Code", lambda *_: Code(ROOT / "lib", ROOT))
    redraw.main([])
    assert capsys.readouterr().out == ""  # nothing is stale
    (piece / "figures" / redraw.STAMP).write_text(json.dumps({"A-F3": {**stamp["A-F3"], "code": "0"}}))
    monkeypatch.setattr(redraw, "draw", lambda folder, name, code: None)
    redraw.main([])
    assert capsys.readouterr().out == "results/reference/piece: A-F3\n"


def test_a_csv_that_a_figure_is_not_drawn_from_is_written_with_it(tmp_path):
    source = ROOT / "results" / "reference" / "race"
    (tmp_path / "figures").mkdir()
    shutil.copytree(source / "measures" / "race" / "mnist-cnn-400", tmp_path / "measures" / "race" / "mnist-cnn-400")
    (tmp_path / "config.yaml").write_bytes((source / "config.yaml").read_bytes())
    (tmp_path / "figures.yaml").write_text(yaml.safe_dump({"X-R2": {"races": "measures/race/*-*/*.csv"}}))
    (tmp_path / "figures" / "X-R2.csv").write_text("stale\n")
    before = (tmp_path / "measures" / "race" / "mnist-cnn-400" / "adamw.csv").read_bytes()
    redraw.draw(tmp_path, "X-R2", Code(ROOT / "lib", ROOT))
    kept = pd.read_csv(source / "figures" / "X-R2.csv").query("dataset == 'mnist'").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "figures" / "X-R2.csv"), kept)
    assert (tmp_path / "measures" / "race" / "mnist-cnn-400" / "adamw.csv").read_bytes() == before


def test_pictures_of_the_texts_are_those_of_the_reference():
    reference = {picture.read_bytes() for picture in (ROOT / "results" / "reference").glob("*/figures/*.png")}
    copies = [p for p in (ROOT / "docs").glob("*/*.png") if p.parent.name != "figures"]
    assert len(copies) > 10
    assert [str(copy) for copy in copies if copy.read_bytes() not in reference] == []
