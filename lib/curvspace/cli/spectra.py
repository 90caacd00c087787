"""Eigenpairs, density and sharpness of a loaded network, as plain values; and their pictures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curvspace import eigsh, files, spectral_density
from curvspace.cli.loading import Loaded, user_errors
from curvspace.errors import UserError
from curvspace.monitor import CurvatureMonitor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]


def eigs(one: Loaded, k: int, which: Any, tol: float, vectors: Path | None) -> Result:
    """k extreme eigenpairs with their residuals."""
    start = time.perf_counter()
    operator = one.operator()
    with user_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "converged" says it
        pairs = eigsh(operator, k, which, tol, seed=one.subject.seed, progress=not one.subject.quiet)
    found = {"values": pairs.values.cpu(), "vectors": pairs.vectors.cpu(), "residuals": pairs.residuals.cpu()}
    result = {
        "which": which,
        "tol": tol,
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "products": pairs.products,
        "converged": pairs.converged,
        "seconds": time.perf_counter() - start,
    }
    rows = zip(result["values"], result["residuals"], strict=True)
    lines = [f"{'':>4}{'eigenvalue':>14}{'residual':>12}"]
    lines += [f"{i:>4}{value:>14.6g}{residual:>12.2g}" for i, (value, residual) in enumerate(rows, 1)]
    end = "" if pairs.converged else "; NOT CONVERGED"
    lines.append(f"{_heading(one)}; {pairs.products} products, {result['seconds']:.1f} s{end}")
    save = partial(_write, vectors, lambda file: np.savez(file, **found)) if vectors else None
    return result | {"text": "\n".join(lines), "save": save}


def _write(path: Path, save: Callable[[BytesIO], object]) -> None:
    """A file whole or not at all."""
    data = BytesIO()
    save(data)
    files.write(path, data.getvalue())


def density(one: Loaded, steps: int, probes: int, axis: Any) -> Result:
    """The spectral density with its spread over probes."""
    start = time.perf_counter()
    operator = one.operator()
    with user_errors():
        found = spectral_density(operator, steps=steps, probes=probes, axis=axis, seed=one.subject.seed)
    used = found.nodes[found.weights > 0]
    result = {
        "axis": axis,
        "steps": steps,
        "probes": probes,
        "linear_width": found.linear_width,
        "grid": found.grid.tolist(),
        "density": found.density.tolist(),
        "lower": found.lower.tolist(),
        "upper": found.upper.tolist(),
        "smallest": float(used.min()),
        "largest": float(used.max()),
        "mean_eigenvalue": found.moment(1),
        "negative_share": float((found.weights * (found.nodes < 0)).sum(1).mean()),
        "products": found.products,
        "seconds": time.perf_counter() - start,
    }
    lines = [
        f"from {result['smallest']:.4g} to {result['largest']:.4g}, mean {result['mean_eigenvalue']:.4g}, "
        f"{100 * result['negative_share']:.1f} % negative",
        f"{_heading(one)}; {found.products} products, {result['seconds']:.1f} s; --plot FILE draws it",
    ]
    return result | {"text": "\n".join(lines)}


def sharpness(one: Loaded, k: int, tol: float, csv: Path | None) -> Result:
    """One row a checkpoint, by the monitor, each solve from the last one's eigenvectors."""
    if one.subject.matrix != "hessian":
        raise UserError("sharpness is of the Hessian; leave out --matrix")
    rows = []
    with user_errors():
        monitor = CurvatureMonitor(
            one.at(one.steps[0]),
            one.batches,
            one.loss,
            k=k,
            tol=tol,
            share=None,
            most_negative=True,
            to=csv,
            **one.options,
        )
        for step in one.steps:
            one.at(step)
            row = monitor.measure(step)
            rows.append({key: value for key, value in row.items() if key not in ("wall_s", "overhead")})
            rows[-1]["stable_lr"] = 2 / row["sharpness"] if row["sharpness"] > 0 else float("inf")
    shown = ("step", "loss", "sharpness", "stable_lr", "f_top", "most_negative")
    lines = ["".join(f"{name:>15}" for name in shown)]
    lines += ["".join(f"{row[name]:>15.6g}" for name in shown) for row in rows]
    lines.append(f"{_heading(one)}; stable_lr = 2 / sharpness, f_top: the gradient's share in the top {k} directions")
    return {"rows": rows, "text": "\n".join(lines)}


def _heading(one: Loaded) -> str:
    told = one.description
    at = "" if told["step"] is None or len(one.steps) > 1 else f" at step {told['step']}"
    return (
        f"{told['matrix']} of {told['of']}{at}: {told['parameters']:,} parameters, {told['examples']:,} examples, "
        f"{told['dtype']} on {told['device']}"
    )


def draw_eigs(result: Mapping[str, Any], file: Path) -> None:
    """Eigenvalues in order, residuals as whiskers."""

    def draw(axes: Axes) -> None:
        values = result["values"]
        axes.errorbar(range(1, len(values) + 1), values, yerr=result["residuals"], fmt="o", capsize=3)
        axes.axhline(0, color="grey", lw=0.5)
        axes.set(xlabel=f"eigenvalue ({result['which']})", ylabel="value; whiskers: residual")

    _picture(result, file, draw)


def draw_density(result: Mapping[str, Any], file: Path) -> None:
    """The density, its 10 to 90 % band over probes; on the log axis per unit of asinh(λ / s)."""

    def draw(axes: Axes) -> None:
        grid = result["grid"]
        floor = 1e-6 * max(result["density"])
        axes.fill_between(grid, np.maximum(result["lower"], floor), np.maximum(result["upper"], floor), alpha=0.3)
        axes.plot(grid, np.maximum(result["density"], floor))
        axes.set_yscale("log")
        if result["axis"] == "log":
            axes.set_xscale("symlog", linthresh=result["linear_width"])
        axes.set(xlabel="eigenvalue", ylabel="density; band: 10 to 90 % of probes")

    _picture(result, file, draw)


def draw_sharpness(result: Mapping[str, Any], file: Path) -> None:
    """Sharpness and most negative eigenvalue over steps."""

    def draw(axes: Axes) -> None:
        steps = [row["step"] for row in result["rows"]]
        for name in ("sharpness", "most_negative"):
            axes.plot(steps, [row[name] for row in result["rows"]], "o-", label=name.replace("_", " "))
        axes.axhline(0, color="grey", lw=0.5)
        axes.set(xlabel="step", ylabel="eigenvalue of the Hessian")
        axes.legend()

    _picture(result, file, draw)


def picture_formats() -> list[str]:
    """The endings of files that a picture can be drawn to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return sorted(FigureCanvasAgg.get_supported_filetypes())


def _picture(result: Mapping[str, Any], file: Path, draw: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    axes.set_title(f"{result['of']} ({result['examples']:,} examples)", fontsize=9)
    _write(file, partial(figure.savefig, format=file.suffix[1:], dpi=150))
