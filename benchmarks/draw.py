"""One figure from the tables: times against other libraries, and growth with images, parameters and k."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd


def save(folder: Path) -> None:
    """Write ``benchmarks.png`` and ``benchmarks.pdf`` from whichever tables are in the folder."""
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.4), layout="constrained")
    _times(axes[0], folder / "eigenpairs.csv")
    _growth(axes[1], folder / "scaling_images.csv", "images", "product_s", "seconds a Hessian product")
    _growth(axes[2], folder / "scaling_parameters.csv", "parameters", "ratio", "Hessian product / gradient")
    _growth(axes[3], folder / "scaling_k.csv", "k", "products", "products for k eigenpairs")
    _growth(axes[4], folder / "scaling_parameters.csv", "parameters", "solver_share", "top ten: share not in products")
    for suffix in ("png", "pdf"):
        figure.savefig(
            folder / f"benchmarks.{suffix}", dpi=150, metadata={"CreationDate": None} if suffix == "pdf" else {}
        )
    plt.close(figure)


def _times(axis: plt.Axes, path: Path) -> None:
    axis.set_title("whole call, tolerance 1e-3", fontsize=9)
    if not path.exists():
        axis.set_axis_off()
        return
    table = pd.read_csv(path)
    labels = [f"{work}\n{tool}" for work, tool in zip(table["work"], table["tool"], strict=True)]
    colours = ["C0" if tool == "curvspace" else "0.6" for tool in table["tool"]]
    axis.barh(labels, table["seconds"], color=colours)
    for i, (seconds, residual) in enumerate(zip(table["seconds"], table["residual"], strict=True)):
        axis.text(seconds, i, f" {seconds:.1f} s, residual {residual:.0e}", va="center", fontsize=6)
    axis.invert_yaxis()
    axis.set_xlim(right=1.7 * table["seconds"].max())
    axis.tick_params(labelsize=6)
    axis.set_xlabel("seconds")


def _growth(axis: plt.Axes, path: Path, x: str, y: str, label: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(label)
    if not path.exists():
        axis.set_axis_off()
        return
    table = pd.read_csv(path)
    axis.plot(table[x], table[y], "o-")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0) if y in ("ratio", "solver_share") else axis.set_yscale("log")
