"""A folder for a study of one's own, which runs as it is."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from curvspace import files
from curvspace.cli import stages
from curvspace.errors import UserError

TEMPLATE = Path(__file__).parent / "study_template"
FIXED = ("papers", "data_set", "network", "optimiser")
"""Names of the template's own modules."""


def make(name: str, folder: Path) -> str:
    """Write the template as study ``name`` into a new folder; what to type next."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in FIXED:
        raise UserError(f"{name!r} is no name for a study; small letters, digits and _, a letter first (e.g. spirals)")
    root = stages.repository("workflow/Snakefile")
    if (root / "lib" / "papers" / name).exists():
        raise UserError(f"the repository has a study {name}; take another name")
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or name another folder with --out")
    snakemake = Path(sys.executable).with_name("snakemake")
    program = str(snakemake) if snakemake.is_file() else "snakemake"
    command = [program, "--cores", "all", "-s", str(root / "Snakefile"), "--configfile", "study.yaml"]
    words = {"NAME": name, "COMMAND": shlex.join(command)}
    for source in sorted(file for file in TEMPLATE.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
        target = folder / str(source.relative_to(TEMPLATE)).replace("NAME", name)
        with files.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_filled(source.read_text(encoding="utf-8"), words), encoding="utf-8")
    return f"cd {shlex.quote(str(folder))}\n{words['COMMAND']}"


def _filled(text: str, words: dict[str, str]) -> str:
    for word, meant in words.items():
        text = text.replace(word, meant)
    return text
