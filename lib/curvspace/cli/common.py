"""What the commands of all stages share: their options, and the record beside their outputs.

Nothing here imports torch: figures and tables are made without it.
"""

from __future__ import annotations

import argparse
import ast
import errno
import hashlib
import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from curvspace import files
from curvspace.cli.failures import is_users
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
        value = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, got {type(value).__name__}")
    return value


def require_file(option: str, file: Path | None, endings: Collection[str] = ()) -> None:
    """Refuse, before anything is computed, an option's file that could not be written in the end."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder; name a file")
    if endings and file.suffix[1:].lower() not in endings:
        raise UserError(f"{option} {file} must end in .{' or .'.join(endings)}")
    with files.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise OSError(errno.EACCES, f"its folder {file.parent} is read-only")


def tell(text: str) -> None:
    """Print a result. Where nobody reads it any more (``| head``) the command ends without a word."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        raise SystemExit(128 + 13) from None  # as of SIGPIPE


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


def users_code(spec: Mapping[str, Any]) -> str:
    """A digest of the user's modules that the ``module:function``s of a run's spec bring in; empty if it has none.

    Comments and layout do not count. Where the pipeline runs a job, its own hash stands for all code.
    """
    blocks = [spec.get(key) for key in ("model", "optimizer")]
    kinds = [str(block.get("kind")) for block in blocks if isinstance(block, Mapping)]
    found: dict[str, str] = {}
    for module in sorted(kind.partition(":")[0] for kind in kinds if ":" in kind):
        with suppress(Exception):  # whoever builds it says what is wrong
            importlib.import_module(module)
        _read_users(module, found)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16] if found else ""


def _read_users(module: str, found: dict[str, str]) -> None:
    """Add the source of a loaded module, if it is the user's, and of those that it imports."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module in found or not file or not is_users(file):
        return
    with suppress(OSError, ValueError, SyntaxError):
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        found[module] = ast.unparse(tree)
        names = [module.rpartition(".")[0]]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = sys.modules[module].__package__ or ""
                base = resolve_name("." * node.level + (node.module or ""), package)
                names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            _read_users(name, found)


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
