"""The command as a user types it, on the networks and data of ``users_code``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import curvspace
from curvspace.cli.app import app

HERE = "users_code"
WORDS = ("eigs", "--model", f"{HERE}:build", "--data", f"{HERE}:pair")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(curvspace.__file__).parents[1])}
"""Of a process of its own."""


def run(*words: str | Path, ok: bool = True) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert (done.exit_code == 0) == ok, done.output
    if not ok:
        (line,) = done.stderr.strip().splitlines()
        return line
    return done.stdout


def found(*words: str | Path) -> dict[str, Any]:
    return json.loads(run(*words, "--json", "--quiet", "--device", "cpu"))
