"""Progress in a log file: a line a minute with what is done and left; short work leaves none."""

from __future__ import annotations

import pytest
import torch

from curvspace import eigsh, progress


def test_short_work_leaves_no_line(capsys):
    assert list(progress.bar(range(3), desc="short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_long_work_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    assert list(progress.bar(range(3), desc="spectra")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("spectra: 3 of 3 items, 00:00 so far, about 00:00 left")
    assert all(line.startswith("spectra: ") for line in lines)


def test_work_of_unknown_length_says_how_much_is_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    eigsh(torch.diag(torch.arange(1.0, 31.0)), k=2, progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("eigsh: ")
    assert " products, 00:00 so far, " in last
    assert "/2 pairs, worst residual" in last


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_no_line_where_none_is_asked_for(capsys, monkeypatch, seconds):
    monkeypatch.setattr(progress, "LINE_S", seconds)
    assert list(progress.bar(range(3), show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
