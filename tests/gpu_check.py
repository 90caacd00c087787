"""All that depends on a device, on one device: `make gpu-check`, or ``python tests/gpu_check.py --device cuda``.

Every step runs whatever became of the others, within its share of what is left of the ten minutes, and what failed is
said at the end, of all steps together: the tests that take a device, a short benchmark, the smoke preset, and a run
that is stopped on one device and continued on another, both ways. Logs and results lie in ``results/gpu-check``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("results/gpu-check")
TELLING = re.compile(
    r"FAILED|ERROR|Error|error:|curvspace \w+:|stale |missing |Warning: .*deterministic|CUDA|timed out"
)


@dataclass(frozen=True)
class Step:
    """``share`` of the whole time; ``run`` gets the seconds, writes to the log and gives the exit status."""

    name: str
    share: float
    run: Callable[[Path, float], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all steps together (default: %(default)s)")
    parser.add_argument("--only", help="steps, separated by commas")
    options = parser.parse_args()
    os.chdir(ROOT)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    found = []
    chosen = [step for step in steps(options.device) if not options.only or step.name in options.only.split(",")]
    end = time.monotonic() + 60 * options.minutes
    for i, step in enumerate(chosen):
        log, start = FOLDER / f"{step.name}.log", time.monotonic()
        limit = (end - start) * step.share / sum(other.share for other in chosen[i:])  # what one leaves, the next has
        print(f"{step.name} (at most {limit:.0f} s) …", flush=True)
        status = step.run(log, limit)
        found.append((step.name, status, time.monotonic() - start, log))
        print(f"{step.name}: {'passed' if status == 0 else 'FAILED'} after {found[-1][2]:.0f} s", flush=True)
    failed = [(name, log) for name, status, _, log in found if status]
    for name, log in failed:
        print(f"\n--- {name} failed; from {log}:")
        print("\n".join(telling(log)))
    print(f"\n{len(found) - len(failed)} of {len(found)} steps passed on {options.device}")
    raise SystemExit(bool(failed))


def steps(device: str) -> list[Step]:
    python = sys.executable
    tests = [python, "-m", "pytest", "-m", "gpu", "-n", "2", "-ra", "--tb=short", "tests/unit"]
    sections = "products,class_gradients,steps"
    benchmark = [python, "-m", "benchmarks", "--device", device, "--images", "256", "--only", sections]
    benchmark += ["--data", str(FOLDER / "images"), "--out", str(FOLDER / "benchmark")]
    snakemake = [python, "-m", "snakemake", "--cores", "all", "--configfile", "workflow/presets/smoke.yaml"]
    study = ["--config", f"device={device}", f"results={FOLDER}/smoke"]
    smoke = [*snakemake, "--keep-going", "--show-failed-logs", "--rerun-incomplete", *study]
    return [
        Step("device", 0.03, lambda log, limit: command([python, "-c", DESCRIBE, device], log, limit)),
        Step("resume", 0.12, lambda log, limit: resumed(device, log, limit)),
        Step("tests", 0.3, lambda log, limit: command(tests, log, limit, device)),
        Step("benchmark", 0.15, lambda log, limit: made_images() or command(benchmark, log, limit)),
        Step("smoke", 0.36, lambda log, limit: command(smoke, log, limit)),
        Step("verify", 0.04, lambda log, limit: command([*snakemake, *study, "--", "verify"], log, limit)),
    ]


DESCRIBE = """
import sys, torch
from curvspace.arithmetic import arithmetic
from curvspace.device import use
print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPUs", torch.cuda.device_count())
with use(sys.argv[1]) as device:
    print(device, torch.cuda.get_device_name(device) if device.type == "cuda" else "", arithmetic())
    x = torch.randn(512, 512, device=device)
    assert torch.isfinite(x @ x).all()
"""


def command(words: list[str], log: Path, limit: float, device: str | None = None) -> int:
    """Exit status of a command with its output in the log; 124 if it was stopped at the time limit.

    ``device``: the one on which tests must run, beside the CPU.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/lib:{ROOT}", "PYTHONWARNINGS": "default"}
    environment |= {} if device is None else {"GPU_CHECK_DEVICE": device}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("a") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            file.write(f"\ntimed out after {limit:.0f} s\n")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124


def telling(log: Path, alike: int = 20) -> list[str]:
    """The lines of a log that say what is wrong, so many of a kind at most, and its end."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    kinds: dict[str, list[str]] = {}
    for line in dict.fromkeys(line.strip()[:300] for line in lines[:-5]):
        if found := TELLING.search(line):
            kinds.setdefault(found.group(), []).append(line)
    said = []
    for kind, marked in kinds.items():
        said += marked[:alike]
        if len(marked) > alike:
            said.append(f"... and {len(marked) - alike} more lines with {kind.strip()!r}: {log}")
    return [*said, *lines[-5:]]


def made_images() -> None:
    """Random images in CIFAR-10's shape, so that the benchmark needs no network."""
    from curvspace.datasets.store import Arrays, make_card, save

    random = np.random.default_rng(0)
    parts = [random.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8) for n in (512, 64)]
    arrays = Arrays(parts[0], np.arange(512) % 10, parts[1], np.arange(64) % 10, num_classes=10)
    save(FOLDER / "images", arrays, make_card("cifar10", arrays, "made here", {}))


def resumed(device: str, log: Path, limit: float) -> int:
    """A run is stopped on one device and continued on another, both ways."""
    python, end = sys.executable, time.monotonic() + limit
    data = FOLDER / "digits"
    status = command([python, "-m", "curvspace.cli.data", "digits", "--offline", "--out", str(data)], log, limit)
    for first, second in dict.fromkeys([(device, "cpu"), ("cpu", device)]):
        out = FOLDER / f"{first}-then-{second}".replace(":", "")
        for there, stopped in ((first, True), (second, False)):
            train = [python, "-m", "curvspace.cli.train", "--spec", json.dumps(run_on(there)), "--quiet"]
            train += ["--data", str(data), "--out", str(out)]
            if stopped:
                train = [python, "-c", STOP, str(out), *train]
            status = command(train, log, end - time.monotonic()) or status
        if (out / "run.json").is_file():
            record = json.loads((out / "run.json").read_text())
            devices, wanted = [name.partition(":")[0] for name in record["devices"]], [first, second]
            wanted = list(dict.fromkeys(name.partition(":")[0] for name in wanted))
            if devices != wanted or record["status"] != "finished":
                status = 1
                with log.open("a") as file:
                    file.write(f"error: {out} computed on {devices}, wanted {wanted}; status {record['status']}\n")
        else:
            status = status or 1
    return status


def run_on(device: str) -> dict[str, object]:
    dataset = {"name": "digits", "source": "digits", "validation": 200}
    optimizer = {"name": "curveball", "kind": "curveball"}
    model = {"name": "lenet", "kind": "lenet", "channels": [4, 8], "dense": 16}
    task = {"epochs": 20, "checkpoint_every": 20}
    return {"dataset": dataset, "model": model, "optimizer": optimizer, "task": task} | {
        "batch_size": 64,
        "lr": 1.0,
        "device": device,
    }


STOP = """
import signal, subprocess, sys, time
from pathlib import Path
run = subprocess.Popen(sys.argv[2:])
while run.poll() is None and not Path(sys.argv[1] + ".state", "checkpoints", "step-40.pt").exists():
    time.sleep(0.01)
run.send_signal(signal.SIGTERM)
stopped = run.wait() == 1 and Path(sys.argv[1] + ".state", "resume.pt").exists()
sys.exit(0 if stopped else "error: the run did not stop and save its state")
"""


if __name__ == "__main__":
    main()
