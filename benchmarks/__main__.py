"""Run all rows in one process, print them, and write CSV tables and a figure to results/benchmarks.

python -m benchmarks [--images 2048] [--threads 2] [--clock wall] [--device cpu] [--only products,eigenpairs]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import draw, exactness, networks, rows, scaling
from benchmarks.problem import CLOCKS, trained_problem, use_clock
from curvspace.arithmetic import full_float32

SECTIONS = ("exactness", "products", "class_gradients", "eigenpairs", "networks", "tracking", "steps", "scaling")
PEERS = ("curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian", "scipy")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed, side by side.")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: processor seconds (1 thread)")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--networks", default=";".join(networks.NETWORKS), help="names for the section of that name")
    parser.add_argument("--largest", type=int, default=50_000, help="images of the largest scaling run")
    arguments = parser.parse_args()
    asked = arguments.only.split(",")
    if unknown := set(asked) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    use_clock(arguments.clock)
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    if device.type != "cpu" and "networks" in asked:
        print("networks is left out: it measures a processor, in forked processes, which cannot use a GPU", flush=True)
        asked.remove("networks")
    with full_float32(device):  # of the peers too
        run(arguments, asked, device)


def run(arguments: argparse.Namespace, asked: list[str], device: torch.device) -> None:
    """The sections asked for, one after the other."""
    record_machine(arguments.out, device, arguments.threads, arguments.clock)
    problem = trained_problem(arguments.data, arguments.images, device)
    count = arguments.images
    counts = [n for n in (1_000, 2_000, 5_000, 10_000, 20_000, 50_000) if n <= arguments.largest]
    speed = {
        "exactness": exactness.errors,
        "products": lambda: rows.products(problem, count, device),
        "class_gradients": lambda: rows.class_gradient_pass(problem, count, device),
        "eigenpairs": lambda: rows.eigenpairs(problem, count, device),
        "networks": lambda: networks.eigenpairs(problem, arguments.networks.split(";")),
        "tracking": lambda: rows.tracking(problem, count // 4, device),
        "steps": lambda: rows.steps(problem, device),
    }
    for name, section in speed.items():
        if name in asked:
            write(section(), arguments.out / f"{name}.csv")
    if "scaling" in asked:
        write(scaling.with_data(problem, arguments.data, counts, device), arguments.out / "scaling_images.csv")
        write(scaling.with_parameters(problem, 16, device), arguments.out / "scaling_parameters.csv")
        write(scaling.with_k(problem, 1024, device), arguments.out / "scaling_k.csv")
    draw.save(arguments.out)


def write(table: Iterable[dict[str, Any]], path: Path) -> None:
    """Print each row when it is there, and keep the table."""
    held = []
    for row in table:
        held.append(row)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        pd.DataFrame(held).to_csv(path, index=False)


def record_machine(folder: Path, device: torch.device, threads: int, clock: str) -> None:
    """What the times were measured on."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in PEERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "clock": clock,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_at_start": os.getloadavg()[0],
        "versions": versions,
    }
    (folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    print(json.dumps(machine), flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
