"""One data set: obtained, checked, and written as plain arrays; ``python -m curvspace.cli.data mnist --out DIR``.

The pipeline's spec is ``{"source": name, …}`` with the options that shape the arrays of a generated set or of a user's
own. Where the arrays come from is no part of it: they are the same from every source.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from curvspace.cli.common import one_line_errors, provenance, take_spec
from curvspace.datasets.catalogue import source_names
from curvspace.datasets.obtain import DEFAULT_ORDER, DataUnavailable, prepare
from curvspace.datasets.store import ARRAYS, CARD, WrongData
from curvspace.errors import UserError, WrongValue
from curvspace.files import write_record
from curvspace.training import lock


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the data set that the command line names."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    spec = dict(options.spec or {})
    with one_line_errors("data"):
        if options.name and spec.get("source", options.name) != options.name:
            raise UserError(f"{options.name} is asked for, but --spec has the source {spec['source']!r}")
        spec |= {"source": options.name} if options.name else {}
        if not isinstance(spec.get("source"), str):
            raise UserError("name a data set, or give --spec with a source")
        shaping = {key: value for key, value in spec.items() if key != "source"}
        with lock.hold(options.out):
            try:
                card = prepare(
                    spec["source"],
                    options.out,
                    options=shaping,
                    sources=[source for source in options.sources.split(",") if source],
                    offline=options.offline,
                    folder=options.folder,
                )
            except (DataUnavailable, WrongData) as error:
                raise UserError(str(error)) from error
            except ValueError as error:
                raise WrongValue(str(error)) from error
            record = {**provenance(spec, options.code), "served_by": card["source"]}
            write_record(options.out / "run.json", record, [options.out / ARRAYS, options.out / CARD])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m curvspace.cli.data",
        description="Obtain a data set, check it, and write arrays.npz and card.json.",
        epilog=f"Data sets: {', '.join(source_names())}, or module:function of your own.",
    )
    parser.add_argument("name", nargs="?", help="the data set; may stand in --spec as source instead")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    take_spec(parser, required=False)  # source, and options of a generated or own data set
    parser.add_argument(
        "--sources", default=",".join(DEFAULT_ORDER), help="kinds of source in the order to try (default: %(default)s)"
    )
    parser.add_argument("--offline", action="store_true", help="use only what needs no network")
    parser.add_argument("--folder", help="local folder with original files, for the source 'folder'")
    return parser


if __name__ == "__main__":
    main()
