"""The tables that figures and tables are made from, read from the results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from curvspace import files
from curvspace.errors import UserError


class Arrays(dict[str, np.ndarray]):
    """Arrays by name. Compared and copied as one thing: pandas copies and compares a table's ``attrs``."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __deepcopy__(self, memo: dict[int, Any]) -> Arrays:
        return self


def read(results: Path, inputs: Mapping[str, Sequence[str]]) -> dict[str, pd.DataFrame]:
    """The tables by label; several files under one label are concatenated.

    ``inputs`` has paths of CSV files below ``results``. Arrays beside them (``.npz``, of a measure that declares
    some) are in ``table.attrs["arrays"]``. What was altered since its job wrote it is refused in one line.
    """
    tables = {}
    for label, paths in inputs.items():
        parts = [_table(results / path) for path in paths]
        filled = [part for part in parts if len(part)] or parts
        tables[label] = pd.concat(filled, ignore_index=True) if len(filled) > 1 else filled[0]
        archives = [archive for path in paths if (archive := (results / path).with_suffix(".npz")).is_file()]
        if archives:
            tables[label].attrs["arrays"] = _arrays(label, archives)
    return tables


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


def _arrays(label: str, archives: Sequence[Path]) -> Arrays:
    found = Arrays()
    for archive in archives:
        _check(archive)
        with np.load(archive) as content:
            if twice := set(found) & set(content):
                raise UserError(f"input {label!r}: two measures have the array {min(twice)!r}; give them two labels")
            found.update(content)
    return found
