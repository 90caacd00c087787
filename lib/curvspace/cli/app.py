"""The command ``curvspace``: what each subcommand takes, and what it prints. Torch is imported when one is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from curvspace.cli import common, stages
from curvspace.cli.options import Subject, finite, takes

app = typer.Typer(
    help="Sharp directions of a network's loss: measure them, train in them, rebuild the papers about them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode=None,
)
app.command("train", epilog=stages.TRAIN_EXAMPLES)(stages.train)
app.command("data", epilog=stages.DATA_EXAMPLES)(stages.data)
app.command("redo", epilog=stages.REDO_EXAMPLES)(stages.redo)
app.command("new-study", epilog=stages.NEW_STUDY_EXAMPLE)(stages.new_study)
app.command("verify", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(stages.verify)

EIGS = """Examples:

  curvspace eigs --model torchvision.models:resnet18 --data my.data:loader -k 10 --checkpoint net.pt

  curvspace eigs results/runs/mnist/fc/sgd/bs100-lr0.1-seed0 --which SA -k 3 --plot negative.png
"""
DENSITY = """Example:

  curvspace density --model my.nets:build --data cifar10 --examples 5000 --plot density.png
"""
SHARPNESS = """Examples:

  curvspace sharpness --model fc --data digits

  curvspace sharpness results/runs/mnist/fc/sgd/bs100-lr0.1-seed0 --step all --plot sharpness.png --csv sharpness.csv
"""


@app.command(epilog=EIGS)
@takes(Subject)
def eigs(
    subject: Subject,
    k: Annotated[int, typer.Option("-k", "--k", help="How many eigenpairs.")] = 10,
    which: Annotated[
        str, typer.Option(help="LA largest, SA most negative, LM largest magnitude, BE both ends.")
    ] = "LA",
    tol: Annotated[float, typer.Option(help="Residuals allowed, relative (see eigsh).")] = 1e-3,
    vectors: Annotated[Path | None, typer.Option(help="Save values and vectors (P, k) to this .npz.")] = None,
) -> None:
    """Extreme eigenpairs of the Hessian or the Gauss-Newton matrix, with true residuals."""
    from curvspace.cli import spectra

    _show(
        subject,
        "eigs",
        lambda one: spectra.eigs(one, k, which, tol, vectors),
        spectra.draw_eigs,
        ("--vectors", vectors, ("npz",)),
    )


@app.command(epilog=DENSITY)
@takes(Subject)
def density(
    subject: Subject,
    steps: Annotated[int, typer.Option(help="Lanczos steps of each probe.")] = 40,
    probes: Annotated[int, typer.Option(help="Random probes.")] = 5,
    axis: Annotated[str, typer.Option(help="linear, or log on both sides of zero.")] = "log",
) -> None:
    """The density of the whole spectrum by stochastic Lanczos quadrature."""
    from curvspace.cli import spectra

    _show(subject, "density", lambda one: spectra.density(one, steps, probes, axis), spectra.draw_density)


@app.command(epilog=SHARPNESS)
@takes(Subject)
def sharpness(
    subject: Subject,
    k: Annotated[int, typer.Option("-k", "--k", help="Top eigenpairs; f_top is the gradient's share in them.")] = 5,
    tol: Annotated[float, typer.Option(help="Residuals allowed, relative (see eigsh).")] = 1e-3,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows to this new CSV file.")] = None,
) -> None:
    """Sharpness, stable learning rate, gradient share, most negative eigenvalue; of one checkpoint or all."""
    from curvspace.cli import spectra

    _show(
        subject,
        "sharpness",
        lambda one: spectra.sharpness(one, k, tol, csv),
        spectra.draw_sharpness,
        ("--csv", csv, ()),
    )


def _show(
    subject: Subject,
    name: str,
    compute: Callable[[Any], Mapping[str, Any]],
    draw: Callable[[Mapping[str, Any], Path], None],
    *outputs: tuple[str, Path | None, tuple[str, ...]],
) -> None:
    """Load, compute, print for people or as JSON, draw. ``outputs``: further files, as (option, file, endings)."""
    with common.one_line_errors(name):
        from curvspace.cli import spectra
        from curvspace.cli.loading import opened

        for option, file, endings in outputs:
            common.require_file(option, file, endings)
        if subject.plot:
            common.require_file("--plot", subject.plot, spectra.picture_formats())
        loaded: AbstractContextManager[Any] = opened(subject)
        with loaded as one:
            result = {"command": name, **one.description, **compute(one)}
        text, save = result.pop("text"), result.pop("save", None)
        common.tell(json.dumps(finite(result), indent=2, allow_nan=False) if subject.json else text)
        if save:
            save()
        if subject.plot:
            draw(result, subject.plot)
            print(f"drawn: {subject.plot}", file=sys.stderr)


def main() -> None:
    sys.path.insert(0, "")  # module:function may lie where the user stands, as with python -m
    app(prog_name="curvspace")


if __name__ == "__main__":
    main()
