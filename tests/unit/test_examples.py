"""The examples run, at their quick size, and stay short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples_and_each_is_under_forty_lines():
    assert len(EXAMPLES) >= 3
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 40, path.name


@pytest.fixture(scope="module")
def output() -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    found = {}
    for path in EXAMPLES:
        done = subprocess.run([sys.executable, path, "--quick"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"
        found[path.stem] = done.stdout
    return found


def test_resnet18_has_both_ends(output):
    values = [float(v) for v in re.findall(r"eigenvalue +(-?[\d.]+)", output["resnet18_spectrum"])]
    assert len(values) == 2
    assert values == sorted(values, reverse=True)
    assert values[0] > 0 > values[-1]
    assert "P = 11,181,642" in output["resnet18_spectrum"]


def test_transformer_by_parts(output):
    sharpness = [float(v) for v in re.findall(r"sharpness ([\d.]+)", output["transformer_with_mask"])]
    assert len(sharpness) == 3
    assert max(sharpness[1:]) <= sharpness[0] * 1.01  # interlacing: a part is never sharper than the whole
    assert "class gradients (4, 18820)" in output["transformer_with_mask"]


def test_training_resumed_bit_for_bit(output):
    assert "bit for bit" in output["resumed_training"]
    assert "learning rate 0.2500" in output["resumed_training"]  # half of the cosine
