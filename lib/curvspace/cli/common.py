"""What the commands of all stages share: their options, and the record beside their outputs.

Nothing here imports torch: figures and tables are made without it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from curvspace.cli.failures import one_line_errors as one_line_errors
from curvspace.errors import UserError

LIBRARIES = ("torch", "numpy", "scipy", "pandas", "matplotlib", "seaborn")


def parser(stage: str, description: str, package: str = "curvspace") -> argparse.ArgumentParser:
    """The command's options that all stages have: ``--spec``, ``--code`` and ``--threads``."""
    result = argparse.ArgumentParser(f"python -m {package}.cli.{stage}", description=description)
    take_spec(result, required=True)
    result.add_argument("--threads", type=int, help="CPU threads (default: the library's own choice)")
    return result


def take_spec(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options ``--spec`` and ``--code``."""
    parser.add_argument(
        "--spec",
        required=required,
        type=json_object,
        action=_Spec,
        help="what to do, as JSON, or @FILE with JSON in it: this, a run.json, or a file of the pipeline's .specs",
    )
    parser.add_argument("--code", default="", help="hash of the code that runs; kept in the record beside the outputs")


class _Spec(argparse.Action):
    """Takes the job out of a record, and the job and its code hash out of a spec file of the pipeline."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        job = values.get("job")
        namespace.spec = job if isinstance(job, dict) else values
        if set(values) == {"job", "code"}:
            namespace.code = values["code"]


def json_object(text: str) -> dict[str, Any]:
    """A JSON object from the command line or, after an ``@``, from a file."""
    try:
        value = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, json.JSONDecodeError) as error:
        raise argparse.ArgumentTypeError(f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, got {type(value).__name__}")
    return value


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    module_name, separator, function = name.partition(":")
    if not (module_name and separator and function):
        raise UserError(f"{name!r} does not name a function; write module:function")
    try:
        found = getattr(importlib.import_module(module_name), function, None)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise UserError(f"there is no module {module_name} on Python's path (asked for as {name!r})") from None
    if not callable(found):
        raise UserError(f"module {module_name} has no function {function}")
    return found


def set_threads(count: int | None) -> None:
    """Hold torch to so many CPU threads, which take denormal numbers for zero (:mod:`curvspace.denormals`)."""
    import torch

    if count is not None and count < 0:
        raise UserError(f"--threads must not be negative, got {count}")
    if count:
        torch.set_num_threads(count)
    torch.set_flush_denormal(True)  # before the pool starts: its threads inherit it


def spare_the_compiler() -> None:
    """Take the guards for ``torch.compile`` off ``torch.optim``, in this process.

    The first call of a guarded method imports the compiler: 1.8 to 2.2 s, more than many a run takes, and no job
    compiles. What the methods do is torch's own code, unchanged.
    """
    import torch

    guarded = {"add_param_group", "load_state_dict", "state_dict", "step", "zero_grad"}
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            for name in guarded & vars(kind).keys():
                setattr(kind, name, torch.no_grad()(inspect.unwrap(vars(kind)[name])))


def provenance(spec: Mapping[str, Any], code: str, device: object | None = None) -> dict[str, Any]:
    """Where a result comes from: the job as asked for, its code, and what it ran on."""
    return {
        "job": spec,
        "code": code,
        "commit": _commit(),
        "device": _device_name(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: object | None) -> str:
    """The device with the model of the hardware behind it."""
    if device is None or str(device) == "cpu":
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    import torch

    return f"{device} ({torch.cuda.get_device_name(str(device))})"


def _commit() -> str | None:
    """The repository's commit, with a ``+`` when tracked files were changed since; None outside of git."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
