"""The tables that figures and tables are made from, read from the results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from curvspace import files
from curvspace.errors import UserError


def read(results: Path, inputs: Mapping[str, Sequence[str]]) -> dict[str, pd.DataFrame]:
    """The tables by label; several files under one label are concatenated.

    ``inputs`` has paths of CSV files below ``results``. What was altered since its job wrote it is refused in one line.
    """
    tables = {}
    for label, paths in inputs.items():
        parts = [_table(results / path) for path in paths]
        filled = [part for part in parts if len(part)] or parts
        tables[label] = pd.concat(filled, ignore_index=True) if len(filled) > 1 else filled[0]
    return tables


def digests(results: Path, inputs: Mapping[str, Sequence[str]]) -> dict[Path, str]:
    """The digest of each file that :func:`read` reads, for the record of what is made from them."""
    return {results / path: files.digest(results / path) for paths in inputs.values() for path in paths}


def _table(path: Path) -> pd.DataFrame:
    _check(path)
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except pd.errors.ParserError as error:
        raise UserError(f"{path} is not a readable table: {error}") from None


def _check(path: Path) -> None:
    """Compare with the record of the measure, or of the run, that wrote it."""
    own = path.with_suffix(".run.json")
    files.check(path, own if own.is_file() else path.parent / "run.json")
