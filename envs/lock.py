"""Pin the tested set: ``requirements.lock`` (versions and hashes) and ``pipeline.yaml`` (the same versions, for conda).

Run with ``make lock``; needs the program ``uv``. ``pyproject.toml`` stays the one source of version ranges. The lock is
universal: one set of versions, with markers for what only some systems need (the GPU libraries of Linux).

``python envs/lock.py without-torch`` prints the lock without torch and its GPU libraries, and ``... torch`` the pins of
torch alone: with another build of torch (``make run TORCH=cpu``) the two are installed one after the other.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = ("pipeline", "slurm", "test", "lint", "docs")
TORCH = re.compile(r"(torch|torchvision)==")
GPU = re.compile(r"(nvidia|cuda|triton)(-[a-z0-9-]+)?==")


def compile_lock(target: Path) -> None:
    """Resolve ``pyproject.toml`` with its extras for Python 3.11 into a pip lock without addresses."""
    command = [sys.executable, "-m", "uv", "pip", "compile", str(HERE.parent / "pyproject.toml"), "--quiet"]
    command += [f"--extra={extra}" for extra in EXTRAS]
    command += ["--python-version=3.11", "--universal", "--generate-hashes", "--no-emit-index-url"]
    subprocess.run([*command, "--no-header", "--no-annotate", f"--output-file={target}", "--upgrade"], check=True)


def pins(lock: Path) -> list[str]:
    """The lines ``name==version`` (with markers) of a pip lock."""
    return [line.rstrip(" \\") for line in lock.read_text().splitlines() if re.match(r"[A-Za-z0-9]", line)]


def without_torch(text: str) -> str:
    """A lock without torch, torchvision and the libraries that they need for a GPU alone; hashes stay."""
    blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)
    return "".join(block for block in blocks if not (TORCH.match(block) or GPU.match(block)))


def conda_file(requirements: list[str]) -> str:
    """A conda environment with Python and the same pins inline."""
    lines = ["# Made by envs/lock.py from requirements.lock: the same pins for conda users.", "name: curvspace"]
    lines += ["channels:", "  - conda-forge", "dependencies:", "  - python=3.11", "  - pip", "  - pip:"]
    return "\n".join([*lines, *(f'      - "{pin}"' for pin in requirements)]) + "\n"


def main(wanted: str) -> None:
    lock = HERE / "requirements.lock"
    if wanted == "without-torch":
        print(without_torch(lock.read_text()), end="")
    elif wanted == "torch":
        print(*(pin.partition(" ;")[0] for pin in pins(lock) if TORCH.match(pin)))
    else:
        compile_lock(lock)
        (HERE / "pipeline.yaml").write_text(conda_file(pins(lock)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "all")
