"""The dates of the files that tell jobs what to do: all that Snakemake has where its memory is lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from curvspace.cli.common import provenance
from curvspace.files import write_record
from workflow import spec_files
from workflow.specs import Job


@pytest.mark.parametrize("ahead_s", [0, 3600], ids=["clock as it was", "clock set back"])
def test_a_changed_setting_is_dated_later_than_the_results_whatever_the_clock(ahead_s, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = Path("results/tables/t.run.json")
    write_record(record, provenance({"lr": 0.1}, "code"))
    made = time.time() + ahead_s
    os.utime(record, (made, made))
    old = spec_files.of_job(Job("table", "t", {"lr": 0.1}, "code", str(record)), "results")
    changed = spec_files.of_job(Job("table", "t", {"lr": 0.2}, "code", str(record)), "results")
    assert os.stat(old).st_mtime == spec_files.LONG_AGO
    assert os.stat(changed).st_mtime > made
