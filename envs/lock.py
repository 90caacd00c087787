"""Pin the tested set: ``requirements.lock`` (versions and hashes) and ``pipeline.yaml`` (the same versions, for conda).

Run with ``make lock``; needs the program ``uv``. ``pyproject.toml`` stays the one source of version ranges.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = ("pipeline", "slurm", "test", "lint", "docs")


def compile_lock(target: Path) -> None:
    """Resolve ``pyproject.toml`` with its extras for Python 3.11 into a pip lock without addresses."""
    command = [sys.executable, "-m", "uv", "pip", "compile", str(HERE.parent / "pyproject.toml"), "--quiet"]
    command += [f"--extra={extra}" for extra in EXTRAS]
    command += ["--python-version=3.11", "--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate"]
    subprocess.run([*command, f"--output-file={target}", "--upgrade"], check=True)


def pins(lock: Path) -> list[str]:
    """The lines ``name==version`` (with markers) of a pip lock."""
    return [line.rstrip(" \\") for line in lock.read_text().splitlines() if re.match(r"[A-Za-z0-9]", line)]


def conda_file(requirements: list[str]) -> str:
    """A conda environment with Python and the same pins inline."""
    lines = ["# Made by envs/lock.py from requirements.lock: the same pins for conda users.", "name: curvspace"]
    lines += ["channels:", "  - conda-forge", "dependencies:", "  - python=3.11", "  - pip", "  - pip:"]
    return "\n".join([*lines, *(f'      - "{pin}"' for pin in requirements)]) + "\n"


if __name__ == "__main__":
    compile_lock(HERE / "requirements.lock")
    (HERE / "pipeline.yaml").write_text(conda_file(pins(HERE / "requirements.lock")))
