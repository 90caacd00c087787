"""The pinned environments: one set of versions, no addresses."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
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


def test_one_lock_serves_systems_without_a_gpu_library():
    """What NVIDIA's GPUs need alone is for Linux alone, so that a Mac does not ask for it."""
    gpu = [pin for pin in lock.pins(ENVS / "requirements.lock") if lock.GPU.match(pin)]
    assert len(gpu) > 10
    assert all("sys_platform == 'linux'" in pin for pin in gpu)


def test_without_torch_all_else_stays_with_its_hashes(tmp_path):
    whole = ENVS / "requirements.lock"
    (tmp_path / "rest").write_text(lock.without_torch(whole.read_text()))
    left = set(lock.pins(whole)) - set(lock.pins(tmp_path / "rest"))
    assert {re.split("[-=]", pin)[0] for pin in left} == {"torch", "torchvision", "nvidia", "cuda", "triton"}
    other = "torch-runstats==1 \\\n    --hash=sha256:ab\n"
    assert lock.without_torch(other) == other


def make(*arguments: str) -> str:
    command = ["make", "-n", "-f", str(ENVS.parent / "Makefile"), *arguments]
    return subprocess.run(command, cwd=ENVS.parent, capture_output=True, text=True, check=True, env=_own()).stdout


def _own() -> dict[str, str]:
    """The environment without what a ``make test PYTHON=...`` that runs these tests hands on."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}


def test_make_says_the_size_before_it_downloads_and_can_take_another_torch():
    usual, other = make("-B", "smoke"), make("-B", "smoke", "TORCH=cpu")
    assert usual.index("6.0 GB") < usual.index("pip install")
    assert "--require-hashes -r envs/requirements.lock" in usual
    assert '--torch-backend "cpu" $(python3 envs/lock.py torch)' in other
    assert "--require-hashes -r .venv/without-torch.lock" in other
    assert "envs/requirements.lock" not in other


def test_make_alone_lists_every_target():
    text = (ENVS.parent / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    listed = subprocess.run(["make"], cwd=ENVS.parent, capture_output=True, text=True, check=True, env=_own()).stdout
    for target in targets.split():
        assert re.search(rf"^  {target} ", listed, re.MULTILINE), target
