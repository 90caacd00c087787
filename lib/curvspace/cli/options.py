"""What the commands about a network's curvature have in common: whose curvature, on which data, shown how."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from curvspace.errors import UserError


@dataclass(frozen=True)
class Subject:
    """A network, data, a loss, and how to show what is found."""

    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Folder of a finished run: all is known.")] = None
    model: Annotated[str | None, typer.Option(help="module:function that makes the network, or a kind of ours.")] = None
    model_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For that function.")] = None
    checkpoint: Annotated[Path | None, typer.Option(help="Its weights, saved by torch or safetensors.")] = None
    step: Annotated[str, typer.Option(help="Of a run: a step, last, or all (sharpness).")] = "last"
    data: Annotated[str | None, typer.Option(help="module:function -> batches, or a data set's name.")] = None
    data_folder: Annotated[Path, typer.Option(help="Where prepared data sets lie.")] = Path("data")
    loss: Annotated[str | None, typer.Option(help="cross_entropy (default), mse, module:function.")] = None
    examples: Annotated[int | None, typer.Option(help="At most so many examples (named data: 2000).")] = None
    batches: Annotated[int | None, typer.Option(help="At most so many batches.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Of data sets (500); of a pair, else one batch.")] = None
    parameters: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Only these, e.g. 'head.*'.")] = None
    matrix: Annotated[str, typer.Option(help="hessian or gauss-newton (eigs, density).")] = "hessian"
    batch_norm: Annotated[str, typer.Option(help="running or batch statistics.")] = "running"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32"
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None
    seed: Annotated[int, typer.Option(help="Of initial weights and start vectors.")] = 0
    json: Annotated[bool, typer.Option("--json", help="Print JSON, all digits.")] = False
    plot: Annotated[Path | None, typer.Option(help="Draw to this file (png, pdf, svg).")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on the screen.")] = False


def takes(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The fields of a dataclass as options of a command, which gets them as its first argument, an instance."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        hints = get_type_hints(kind, include_extras=True)
        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(kind)
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

        @wraps(command)
        def run(**values: Any) -> None:
            command(kind(**{name: values.pop(name) for name in hints}), **values)

        del run.__wrapped__  # type: ignore[attr-defined]  # its signature is the one below
        run.__signature__ = inspect.Signature([*shared, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*shared, *parameters)}
        return run

    return decorate


WORDS = {"true": True, "false": False, "none": None, "null": None}
"""Of Python and YAML, whatever their case."""


def parsed(pairs: list[str] | None) -> dict[str, Any]:
    """``["width=16", "act=relu", "norm=False"]`` -> ``{"width": 16, "act": "relu", "norm": False}``.

    Values are JSON, or Python's and YAML's words and numbers (``None``, ``.9``); anything else is text, as is what
    stands in quotes.
    """
    found = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise UserError(f"{pair!r} is no option; write NAME=VALUE")
        found[name.replace("-", "_")] = _value(text)
    return found


def _value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    return text


def finite(value: Any) -> Any:
    """A value for JSON, which has no word for NaN and infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
