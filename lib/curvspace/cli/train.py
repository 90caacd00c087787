"""One training run: metrics.csv, checkpoints/ and run.json in the run's folder.

The spec has ``dataset``, ``model`` and ``optimizer`` (config blocks with their ``name``), ``task``, ``batch_size``,
``lr``, ``seed`` and ``device``. Stopped at any moment, the same command continues where it was.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from curvspace.arithmetic import arithmetic
from curvspace.cli import common
from curvspace.device import use
from curvspace.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("train", __doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data sets, or of this one")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--state", type=Path, help="where an unfinished run lies (default: beside the run's folder)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run of other settings")
    options = parser.parse_args(arguments)
    with common.one_line_errors("train"):
        common.set_threads(options.threads)
        common.spare_the_compiler()
        from curvspace.training.run import Interrupted, train
        from curvspace.training.spec import RunSpec

        code = options.code or common.users_code(options.spec)
        try:
            spec = RunSpec.from_dict(options.spec)
        except ValueError as error:
            raise UserError(str(error)) from None
        with use(spec.device) as device:
            try:
                record = train(
                    spec.on(str(device)),
                    options.data,
                    options.out,
                    options.state,
                    fingerprint=code,
                    provenance={**common.provenance(options.spec, code, device), "arithmetic": arithmetic()},
                    progress=not options.quiet,
                    overwrite=options.overwrite,
                )
            except Interrupted as error:
                raise SystemExit(f"curvspace train: {error}") from None
    print(f"{options.out}: {record.status} after {record.metrics['step'].iloc[-1]} steps")


if __name__ == "__main__":
    main()
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # the run is whole: it cannot fail any more
        signal.signal(getattr(signal, name), signal.SIG_IGN)
