"""One measure: finished runs and data sets in, one tidy table out.

The spec has ``function`` (``module:function``), ``options`` (its keyword arguments), ``runs`` (their folders below
``--results``), ``datasets`` (their config blocks by name) and ``device``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from curvspace.arithmetic import arithmetic
from curvspace.cli import common
from curvspace.device import use
from curvspace.errors import UserError
from curvspace.files import write_record, writing
from curvspace.training.record import RunRecord
from papers.common.context import Context


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("measure", __doc__ or "", "papers")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the prepared data sets")
    parser.add_argument("--out", type=Path, required=True, help="path of the CSV; all else stands beside it")
    options = parser.parse_args(arguments)
    with common.one_line_errors("measure"):
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Run the function and write its table and the record."""
    spec: dict[str, Any] = options.spec
    function = common.load_function(spec["function"])
    common.set_threads(options.threads)
    common.spare_the_compiler()
    scratch = _scratch(options)
    with use(spec.get("device", "cpu")) as device:
        context = Context(
            runs=[RunRecord(options.results / path) for path in spec.get("runs", [])],
            device=device,
            data_dir=options.data,
            settings=spec.get("datasets", {}),
            scratch=scratch,
            code=options.code,
        )
        table = function(context, **spec.get("options", {}))
        record = {**common.provenance(spec, options.code, device), "arithmetic": arithmetic()}
    if not isinstance(table, pd.DataFrame):
        raise UserError(f"{spec['function']} must return a DataFrame, and returned {type(table).__name__}")
    with writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out, index=False)
    # of a run its checkpoints: what it lists beside them has times in it
    made_from = {
        run.path / name: digest
        for run in context.runs
        for name, digest in run.outputs.items()
        if name.startswith("checkpoints/")
    }
    write_record(options.out.with_suffix(".run.json"), record, [options.out], made_from)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(options: argparse.Namespace) -> Path | None:
    """Where finished parts of a long measure wait for the rest: beside the states of training runs."""
    out, results = options.out.resolve(), options.results.resolve()
    return results / ".state" / out.relative_to(results).with_suffix("") if out.is_relative_to(results) else None


if __name__ == "__main__":
    main()
