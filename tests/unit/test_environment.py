"""The pinned environments: one set of versions, no addresses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import yaml

ENVS = Path(__file__).parents[2] / "envs"
spec = importlib.util.spec_from_file_location("lock", ENVS / "lock.py")
assert spec is not None
assert spec.loader is not None
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)


def test_the_conda_file_has_the_pins_of_the_lock():
    conda = yaml.safe_load((ENVS / "pipeline.yaml").read_text())
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert pip == lock.pins(ENVS / "requirements.lock")
    assert len(pip) > 50


def test_every_pin_has_hashes_and_no_address_is_written():
    text = (ENVS / "requirements.lock").read_text()
    assert "://" not in text
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text)
    assert len(blocks) == len(lock.pins(ENVS / "requirements.lock"))
    assert all("--hash=sha256:" in block for block in blocks)
