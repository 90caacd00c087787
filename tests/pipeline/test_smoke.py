"""The smoke preset from end to end, in a copy of the checkout: every figure, table and claim, the report, verify."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, Project

PRESET = ("--configfile", "workflow/presets/smoke.yaml")
RESULTS = Path("results/smoke")

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished preset."""
    folder = tmp_path_factory.mktemp("smoke") / "project"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("workflow", "lib", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, folder)
    project = Project(folder)
    finished = project.snakemake("--cores", "all", "--show-failed-logs", *PRESET)
    assert finished.returncode == 0, finished.stderr[-6000:]
    return project


def test_every_figure_and_table_is_there_with_its_record(done):
    from workflow import settings
    from workflow.specs import Plan

    plan = Plan(settings.whole(settings.files([ROOT / "config.yaml", ROOT / PRESET[1]])), ROOT)
    assert {artefact.paper for artefact in plan.study.artefacts} >= {"A", "B", "C", "D"}
    for artefact in plan.study.artefacts:
        base = done.folder / RESULTS / artefact.path
        suffixes = (".png", ".pdf", ".csv") if artefact.kind == "figure" else (".csv", ".md", ".tex", ".html")
        for suffix in (*suffixes, ".run.json"):
            assert base.with_name(base.name + suffix).stat().st_size > 0
        assert len(pd.read_csv(base.with_name(f"{base.name}.csv"))) > 0, f"{artefact.id} drew nothing"
        assert artefact.caption


def test_claims_have_verdicts(done):
    claims = pd.read_csv(done.folder / RESULTS / "claims.csv")
    assert claims["verdict"].isin(["holds", "fails", "inconclusive", "not tested at this scale"]).all()


def test_nothing_is_left_to_do_and_nothing_is_stale(done):
    assert done.planned(*PRESET) == set()
    verified = done.snakemake("verify", "--quiet", "all", *PRESET)
    assert verified.returncode == 0, verified.stdout[-3000:]
    assert re.search(r"\d+ current, 0 stale, 0 missing", verified.stdout)


def test_verify_sees_what_snakemake_forgot(done, tmp_path):
    copy = Project(tmp_path / "project")
    shutil.copytree(done.folder, copy.folder, ignore=shutil.ignore_patterns(".snakemake"))
    record = next((copy.folder / RESULTS / "runs").rglob("run.json"))
    content = json.loads(record.read_text())
    content["job"]["lr"] *= 2
    record.write_text(json.dumps(content))
    verified = copy.snakemake("verify", "--quiet", "all", *PRESET)
    assert verified.returncode != 0
    assert "its record was altered; settings differ in lr" in verified.stdout
    assert "1 stale, 0 missing" in verified.stdout


def test_verify_sees_what_was_altered_or_deleted(done, tmp_path):
    copy = Project(tmp_path / "project")
    shutil.copytree(done.folder, copy.folder, ignore=shutil.ignore_patterns(".snakemake"))
    results = copy.folder / RESULTS
    next((results / "tables").glob("*.tex")).write_text("")
    next((results / "figures").glob("*.png")).unlink()
    next((results / "runs").rglob("checkpoints/step-*.pt")).unlink()
    next((copy.folder / "data").rglob("arrays.npz")).unlink()
    verified = copy.snakemake("verify", "--quiet", "all", *PRESET)
    assert verified.returncode != 0
    assert verified.stdout.count("is missing") == 3
    assert verified.stdout.count("was altered") == 1
    assert "4 stale, 0 missing" in verified.stdout


def test_the_report_is_one_page_without_errors(done):
    page = done.folder / "report.html"
    made = done.snakemake(*PRESET, "--report", str(page))
    assert made.returncode == 0, made.stderr[-3000:]
    text = page.read_text()
    assert "A-F1" in text
    assert "system-message" not in text, "a caption is not valid reStructuredText"
    assert not re.search(r"class=.{0,2}problematic", text)
