"""The pipeline's stages from the command line: by options, by a spec in a file, or by a result's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from curvspace.cli import common
from curvspace.cli.options import parsed
from curvspace.errors import UserError

STAGES = {"runs": "train", "measures": "measure", "figures": "figure", "tables": "table"}
"""Folder below results -> the stage that fills it."""

BESIDE = {"figure": (".png", ".pdf"), "table": (".md", ".tex", ".html")}
"""What a stage writes beside its CSV."""

OF_A_SPEC = ["model_option", "data", "data_option", "optimizer", "optimizer_option", "lr", "batch_size", "epochs"]
OF_A_SPEC += ["loss", "seed", "device", "checkpoint_every"]
"""Options of a training that a whole spec says already."""

TRAIN_EXAMPLES = """Examples:

  curvspace train --model fc --data digits --lr 0.1 --optimizer-option momentum=0.9 --epochs 5 --out runs/one

  curvspace train --spec @run.json --out runs/two

  curvspace train results/runs/mnist/fc/sgd/bs100-lr0.1-seed0 --out runs/again
"""
DATA_EXAMPLES = """Examples:

  curvspace data mnist --out data/mnist

  curvspace data imagefolder --folder photos --out data/photos
"""
REDO_EXAMPLES = """Examples:

  curvspace redo results/figures/A-F1 --out /tmp/A-F1.csv

  curvspace redo results/runs/mnist/fc/sgd/bs100-lr0.1-seed0 --out runs/again
"""

NEW_STUDY_EXAMPLE = """Example:

  curvspace new-study spirals
"""

Out = Annotated[Path, typer.Option(help="Where to write.")]
Spec = Annotated[str | None, typer.Option(help="JSON, or @FILE with JSON in it: a spec, or a run.json.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run of other settings.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
DataFolder = Annotated[Path, typer.Option(help="Where prepared data sets lie.")]


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Train as this run was.")] = None,
    spec: Spec = None,
    model: Annotated[
        str | None, typer.Option(help="A kind of ours, or module:function(input_shape, num_classes).")
    ] = None,
    model_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE")] = None,
    data: Annotated[str | None, typer.Option(help="A data set's name, or module:function.")] = None,
    data_folder: DataFolder = Path("data"),
    data_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="E.g. train=5000.")] = None,
    optimizer: Annotated[str, typer.Option(help="A kind of ours, or module:function.")] = "sgd",
    optimizer_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 100,
    epochs: Annotated[float, typer.Option(help="Passes over the training set.")] = 1.0,
    loss: Annotated[str, typer.Option(help="cross_entropy or mse.")] = "cross_entropy",
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    checkpoint_every: Annotated[int, typer.Option(help="Save every so many steps (0: the last alone).")] = 0,
    threads: Threads = None,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """One training run: metrics.csv, checkpoints, run.json. Stopped at any moment, the same command continues it."""
    with common.one_line_errors("train"):
        if sum(given is not None for given in (run, spec, model)) != 1:
            raise UserError("say what to train by one of: a run's folder, --spec, --model (with --data)")
        typed = {name for name in OF_A_SPEC if "COMMANDLINE" in str(context.get_parameter_source(name))}
        if model is None and typed:
            option = min(typed).replace("_", "-")
            raise UserError(f"--{option} stands in the spec already; leave it out, or change it there (--spec @FILE)")
        if model is not None:
            if data is None:
                raise UserError("--model needs --data too")
            job: dict[str, Any] = {
                "dataset": _block("data", "source", data, data_option),
                "model": _block("model", "kind", model, model_option),
                "optimizer": _block("optimizer", "kind", optimizer, optimizer_option),
                "task": {"epochs": epochs, "loss": loss, "checkpoint_every": checkpoint_every},
                "batch_size": batch_size,
                "lr": lr,
                "seed": seed,
                "device": device,
            }
        else:
            job = spec_of(run) if run is not None else given_spec(spec or "")
        if run is not None and out.resolve() == run.resolve():
            raise UserError(f"--out is the run itself; name another folder than {out}")
        folder = data_folder / _prepared_name(job.get("dataset"))
        if not (folder.is_dir() or (data_folder / "arrays.npz").is_file()):
            source = job["dataset"]["source"]
            raise UserError(f"{folder} is not there; make it with: curvspace data {source} --out {folder}")
    from curvspace.cli.train import main

    arguments = [
        "--spec",
        json.dumps(job),
        "--data",
        str(folder if folder.is_dir() else data_folder),
        "--out",
        str(out),
    ]
    arguments += ["--threads", str(threads)] if threads else []
    main([*arguments, *(["--quiet"] if quiet else []), *(["--overwrite"] if overwrite else [])])


def data(
    name: Annotated[str | None, typer.Argument(help="The data set; without it: which there are.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to (default: data/NAME).")] = None,
    spec: Spec = None,
    sources: Annotated[str | None, typer.Option(help="Kinds of source in the order to try.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Original files of yours (source folder, imagefolder).")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only what needs no network.")] = False,
) -> None:
    """Obtain a data set, check it, and write it as plain arrays."""
    with common.one_line_errors("data"):
        if name is None and spec is None:
            from curvspace.datasets.catalogue import source_names

            common.tell(", ".join(source_names()) + ", or module:function of your own")
            return
        job = given_spec(spec) if spec else {}
        if name is None and "source" not in job:
            raise UserError("--spec has no source; name a data set")
        from curvspace.datasets.catalogue import OWN

        if folder and (name or job["source"]) in OWN:  # its folder is part of what it is
            job = {"source": name, **job, "folder": str(folder)}
        where = out or Path("data") / str(name or job["source"])
    from curvspace.cli.data import main

    arguments = [*([name] if name else []), "--out", str(where)]
    arguments += ["--spec", json.dumps(job)] if job else []
    arguments += ["--sources", sources] if sources else []
    arguments += ["--folder", str(folder)] if folder else []
    main([*arguments, *(["--offline"] if offline else [])])
    print(where)


def _block(option: str, key: str, kind: str, pairs: list[str] | None) -> dict[str, Any]:
    """A block of a spec from --model and --model-option, say."""
    options = parsed(pairs)
    if taken := sorted({"name", key} & options.keys()):
        raise UserError(f"--{option}-option {taken[0]} is not allowed: --{option} says it")
    return {"name": kind, key: kind, **options}


def redo(
    context: typer.Context,
    result: Annotated[Path, typer.Argument(help="A run, measure, figure or table below a results folder.")],
    out: Out,
    data_folder: DataFolder = Path("data"),
    threads: Threads = None,
) -> None:
    """Make one result of the pipeline again, elsewhere, from the record beside it and the code as it is now."""
    with common.one_line_errors("redo"):
        stage, results = place(result)
        record = record_of(result)
        if record.resolve() in ((out / "run.json").resolve(), out.with_suffix(".run.json").resolve()):
            raise UserError(f"--out is the result itself; name another place than {out}")
        if stage != "train" and not out.with_suffix(".run.json").exists():
            written = [out, *(out.with_suffix(suffix) for suffix in BESIDE.get(stage, ()))]
            if there := next((file for file in written if file.exists()), None):
                raise UserError(f"{there} is there and would be replaced; move it away, or name another file")
        spec = f"@{record}"
        if stage == "train":
            train(context, out=out, spec=spec, data_folder=data_folder, threads=threads)
            return
        command = ["-m", f"papers.cli.{stage}", "--spec", spec, "--results", str(results), "--out", str(out)]
        command += ["--data", str(data_folder)] if stage == "measure" else []
        in_repository("papers/cli", [*command, *(["--threads", str(threads)] if threads else [])], "lib")


def verify(context: typer.Context) -> None:
    """Which results of the pipeline are stale or missing. Options: see curvspace verify -- --help."""
    with common.one_line_errors("verify"):
        in_repository("verify.py", ["-m", "workflow.verify", *context.args], "workflow")


def new_study(
    name: Annotated[str, typer.Argument(help="Small letters, digits and _.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make (default: NAME).")] = None,
) -> None:
    """A folder with a study of your own that runs as it is: data, network, optimiser, one figure."""
    with common.one_line_errors("new-study"):
        from curvspace.cli import new_study as template

        print(template.make(name, out or Path(name)))


def place(result: Path) -> tuple[str, Path]:
    """The stage that made a result, and the results folder that it lies in."""
    for folder in result.resolve().parents:
        if folder.name in STAGES:
            return STAGES[folder.name], folder.parent
    raise UserError(f"{result} lies in none of the folders {', '.join(STAGES)} of a results folder")


def spec_of(result: Path) -> dict[str, Any]:
    """What a result was made of, by the record beside it."""
    file = record_of(result)
    return _job(_read(file), file)


def record_of(result: Path) -> Path:
    """The record beside a result."""
    files = [result / "run.json", result.with_name(f"{result.name}.run.json"), result.with_suffix(".run.json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"there is no record of {result}: neither {files[0]} nor {files[2]}")
    return file


def given_spec(text: str) -> dict[str, Any]:
    """JSON from the command line or, after an ``@``, a file: a spec, or a record that holds one."""
    if text.startswith("@"):
        return _job(_read(Path(text[1:])), Path(text[1:]))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--spec is not readable as JSON ({error}); a file is named with @FILE") from None
    return _job(value, Path("--spec"))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} is not readable: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable as JSON: {error}") from None


def _job(value: Any, file: Path) -> dict[str, Any]:
    job = value.get("job", value) if isinstance(value, dict) else value
    if not isinstance(job, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(job).__name__}")
    return dict(job)


def _prepared_name(dataset: Any) -> str:
    from curvspace.datasets.catalogue import folder_name

    if not (isinstance(dataset, dict) and all(isinstance(dataset.get(key), str) for key in ("name", "source"))):
        raise UserError("the spec's dataset needs a name and a source")
    return folder_name(dataset["name"], dataset)


def in_repository(wanted: str, command: list[str], inside: str) -> None:
    """Run Python with the code of the repository's checkout."""
    root = repository(f"{inside}/{wanted}")
    paths = [str(root), str(root / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    raise SystemExit(done.returncode)


def repository(wanted: str) -> Path:
    """The repository's checkout, by a file in it: where the user stands, or where this package's source lies."""
    candidates = [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[3]]
    root = next((folder for folder in candidates if (folder / wanted).exists()), None)
    if root is None:
        raise UserError(f"this needs the repository (a folder with {wanted}); call it from inside a clone")
    return root
