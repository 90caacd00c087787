"""What each job needs and the hash of the code it runs; together they are a file which is an input of the job.

A job's spec holds just what this job needs (its optimiser's block, its batch size, …, never the whole config). A job
is rerun when its spec or its code changes: :mod:`workflow.spec_files` says how Snakemake sees it.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from curvspace.datasets.catalogue import KNOWN, folder_name, prepare_options
from papers import registry
from papers.common import claims, ledger
from papers.common.study import Artefact, Measure, Run, Study, StudyError
from workflow import data_facts, job_checks, options, spec_files
from workflow.checks import problems, problems_of
from workflow.invalidation import Code
from workflow.source import CodeError
from workflow.spec_files import canonical

PAPERS = {
    "A": "Paper A: class-gradient Newton",
    "B": "Paper B: tiny subspace",
    "C": "Paper C: CurveBall",
    "D": "Paper D: negative curvature",
    "X": "Race and tournament",
}
"""The report's headings; it sorts them, Findings first and the Statements of the ledger last."""
WRAPPER = "curvspace.optim.first_order:FirstOrder"
REGISTRIES = {"optimizers": "curvspace.optim.registry", "models": "curvspace.models.registry"}

FIRST_ORDER_ONLY = {"precision": "bfloat16", "compile": True}
"""Options of a task with which curvature cannot be computed."""


def load(config: Mapping[str, Any], root: Path, check: bool = True) -> Plan:
    """The plan of a config; what is wrong with it ends the program with one line for each wrong value.

    ``check`` is false in the Snakemake of a single job, which a checked one has started: it plans its job alone.
    """
    if not check:
        return Plan(config, root)
    lines = problems(config)
    if not lines:
        try:
            plan = Plan(config, root)
            lines = list(dict.fromkeys([*plan.problems(), *registry.problems(config)]))
            lines = lines or list(dict.fromkeys(job_checks.problems(config, plan.study)))
            if not lines:
                list(plan.jobs())
                return plan
        except (StudyError, CodeError) as error:
            lines = [str(error)]
    sys.exit("\n".join(f"config: {line}" for line in lines))


def run_from(root: Path) -> None:
    """Have all jobs run the code of this checkout, in this environment, whatever else is installed."""
    if os.pathsep in str(root):
        sys.exit(f"Python's path cannot hold a folder with {os.pathsep!r} in its name; move the checkout {root}")
    paths = [str(root), str(root / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # jobs call `python`: that of the environment whose snakemake this is, though it may not be active
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@dataclass(frozen=True)
class Job:
    """One job as the pipeline would run it now. ``record`` is the file beside its outputs that says how it ran."""

    stage: str
    name: str
    spec: Mapping[str, Any]
    code: str
    record: str

    @property
    def params(self) -> dict[str, str]:
        return {"spec": canonical(self.spec), "code": self.code}


class Plan:
    """All that a config asks for: the studies, and the spec and code hash of every job.

    Raises ``StudyError`` or ``CodeError``, one line each, for names that lead nowhere.
    """

    def __init__(self, config: Mapping[str, Any], root: Path):
        self.config = config
        self.root = root
        self.results: str = config["results"]
        self.code = Code(root / "lib", root, *([] if Path.cwd() == root else [Path.cwd()]))

    def problems(self) -> list[str]:
        """One line for each kind of model or optimiser that does not exist, and each option that it does not take."""
        lines = [line for name in self.config["datasets"] for line in self._wrong_data(name)]
        for section in self._registered:
            for name, block in self.config[section].items():
                lines += self._wrong_kind(section, f"{section}.{name}", block)
        return lines

    def _wrong_kind(self, section: str, key: str, block: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with a block that has a kind; an optimiser may stand on another one, its ``base``."""
        kinds, kind = self._registered[section], block["kind"]
        if kind in kinds or re.fullmatch(r"[\w.]+:\w+", kind):
            yield from options.problems(self.code, key, block, kinds.get(kind, kind))
        elif kind.replace("_", "-") in kinds:
            yield f"{key}.kind = {kind!r} is now {kind.replace('_', '-')!r}"
        else:
            yield f"{key}.kind = {kind!r} is not allowed; allowed: {', '.join(sorted(kinds))}, or module:function"
        base = block.get("base")
        if section == "optimizers" and kind in kinds and isinstance(base, Mapping):
            wrong = problems_of("optimizer", base, f"{key}.base")
            yield from wrong or self._wrong_kind(section, f"{key}.base", base)
        elif section == "optimizers" and kind in kinds and isinstance(base, str):
            own = (options.schema(self.code, kinds[kind]) or {}).get("properties", {})
            rest = {name: value for name, value in block.items() if name not in own}
            yield from options.problems(self.code, key, rest, f"torch.optim:{base}")

    def _wrong_data(self, name: str) -> Iterator[str]:
        key, block = f"datasets.{name}", self.config["datasets"][name]
        if ":" in block["source"]:
            return options.problems(self.code, key, prepare_options(block), block["source"])
        return data_facts.problems(key, block)

    @cached_property
    def study(self) -> Study:
        """All enabled studies as one."""
        return registry.declare(self.config)

    def jobs(self) -> Iterator[Job]:
        """Every job of the graph."""
        yield from (self.data(name) for name in self.datasets)
        yield from (self.train(run) for run in self.study.runs)
        yield from (self.measure(measure.name) for measure in self.study.measures)
        yield from (self.artefact(artefact.id) for artefact in self.study.artefacts)
        yield self.claims
        if self.pictures:
            yield self.front

    @cached_property
    def datasets(self) -> dict[str, str]:
        """Folders of prepared arrays that the studies need, each with the ``datasets`` entry that describes it."""
        names = [run.dataset for run in self.study.runs]
        names += [name for measure in self.study.measures for name in measure.datasets]
        return {self.data_folder(name): name for name in reversed(names)}

    def data_folder(self, name: str) -> str:
        """Folder of the prepared arrays of a ``datasets`` entry."""
        return f"data/{folder_name(name, self._block('datasets', name))}"

    def runs_of(self, name: str) -> tuple[Run, ...]:
        """The runs that a measure looks at."""
        return tuple(self._listed(self._measures, name, "measure").runs)

    def measured(self, name: str) -> list[str]:
        """What a measure reads: all of its runs, and the cards of its data sets, which hold the arrays' checksum."""
        measure = self._listed(self._measures, name, "measure")
        names = [*measure.datasets, *(run.dataset for run in measure.runs)]
        cards = dict.fromkeys(f"{self.data_folder(name)}/card.json" for name in names)
        parts = ("run.json", "metrics.csv", "checkpoints")
        return [*cards, *(f"{self.results}/{run.path}/{part}" for run in measure.runs for part in parts)]

    def drawn_from(self, id: str) -> list[str]:
        """The tables that a figure or table reads."""
        return [f"{self.results}/{table}" for table in self._artefact(id).files]

    def data(self, folder: str) -> Job:
        """Obtaining a data set. A public one is pinned by its checksum, so its code does not count."""
        block = self._block("datasets", self._listed(self._prepared, folder, "data set"))
        pinned = block["source"] in KNOWN
        roots = ["curvspace.datasets.obtain", *([block["source"]] if ":" in block["source"] else [])]
        spec = {"source": block["source"], **prepare_options(block)}
        return Job("data", folder, spec, "pinned" if pinned else self.code.hash(*roots), f"{folder}/run.json")

    def train(self, run: Run) -> Job:
        """One training run."""
        key = f"{run.dataset}/{run.model}"
        if key not in self.config["tasks"]:
            raise StudyError(f"tasks has no {key!r}, which the run {run.path} needs; add it: its epochs at least")
        blocks = {kind: self._named(f"{kind}s", getattr(run, kind)) for kind in ("dataset", "model", "optimizer")}
        task = self.config["tasks"][key]
        self._require_first_order(key, task, run.optimizer)
        spec = {
            **blocks,
            "task": task,
            "batch_size": run.batch,
            "lr": float(run.lr),
            "seed": run.seed,
            "device": self.config["device"],
        }
        return Job("train", run.path, spec, self._code(["curvspace.cli.train"], blocks), self._path(run.path, "/run"))

    def _require_first_order(self, key: str, task: Mapping[str, Any], optimizer: str) -> None:
        """Refuse options of a task that an optimiser of ours cannot have; one from elsewhere says so itself."""
        asked = [f"{name}: {value}" for name, value in FIRST_ORDER_ONLY.items() if task.get(name) == value]
        target = self._registered["optimizers"].get(self._block("optimizers", optimizer)["kind"], "")
        if asked and target and not target.startswith(f"{WRAPPER.partition(':')[0]}:"):
            raise StudyError(
                f"tasks.{key} has {asked[0]}, which is for first-order optimisers, but a study trains it with "
                f"{optimizer} too; leave it out"
            )

    def measure(self, name: str) -> Job:
        """One measure. The networks of its runs, and all kinds that its settings name, are part of its code."""
        measure = self._listed(self._measures, name, "measure")
        models = {run.model: self._block("models", run.model) for run in measure.runs}
        spec = {
            "function": measure.function,
            "options": measure.spec,
            "runs": [run.path for run in measure.runs],
            "datasets": {name: self._block("datasets", name) for name in measure.datasets},
            "device": self.config["device"],
        }
        code = self._code(["papers.cli.measure", measure.function], [models, spec["options"]])
        return Job("measure", measure.name, spec, code, self._path(measure.path))

    def artefact(self, id: str) -> Job:
        """One figure or table."""
        artefact = self._artefact(id)
        spec: dict[str, Any] = {
            "function": artefact.function,
            "inputs": {label: [source.table for source in sources] for label, sources in artefact.inputs.items()},
            "options": artefact.spec,
            "title": artefact.title,
        }
        if artefact.kind == "figure":
            spec["style"] = self.config.get("style", {})
        code = self.code.hash(f"papers.cli.{artefact.kind}", artefact.function)
        return Job(artefact.kind, artefact.id, spec, code, self._path(artefact.path))

    @cached_property
    def claim_tables(self) -> list[str]:
        """All tables that the ledger reads."""
        return [f"{self.results}/{table}" for table in claims.tables(self.claims.spec)]

    @cached_property
    def claim_files(self) -> list[str]:
        """The files in which the claims stand: from here where they lie below, else by their whole paths."""
        here = Path.cwd()
        files = [file.resolve() for file in registry.claim_files().values()]
        return [str(file.relative_to(here) if file.is_relative_to(here) else file) for file in files]

    @cached_property
    def claims(self) -> Job:
        """The ledger of claims. The claims themselves are a file; their digest stands for them."""
        written = {name: ledger.entries(file) for name, file in registry.claim_files().items()}
        entries = [entry for part in written.values() for entry in part]
        spec: dict[str, Any] = {key: {} for key in ("sources", "scale", "words", "short", "link")}
        for name, part in written.items():
            scale = self.config["studies"].get(name, {}).get("scale", self.config["scale"])
            bound = claims.bind(part, self.study, {**self.config, "scale": scale})
            for key, found in spec.items():
                found |= bound[key]
        spec["claims"] = hashlib.sha256(canonical(entries).encode()).hexdigest()[:16]
        own = [entry["rule"] for entry in entries if ":" in entry.get("rule", "")]
        code = self.code.hash("papers.cli.claims", *registry.verdict_modules(), *own)
        return Job("claims", "claims", spec, code, self._path("claims"))

    @cached_property
    def pictures(self) -> list[dict[str, Any]]:
        """What the report's front page shows: the studies' choice, of figures that this config makes."""
        return [
            {"claims": [], **one, "figure": f"{artefact.path}.png", "caption": artefact.caption}
            for one in registry.pictures(self.config)
            if (artefact := self._artefacts.get(one["figure"]))
        ]

    @property
    def front_pictures(self) -> list[str]:
        """The files of the front page's pictures."""
        return [f"{self.results}/{one['figure']}" for one in self.pictures]

    @cached_property
    def front(self) -> Job:
        """The report's front page."""
        spec = {"claims": "claims.csv", "pictures": self.pictures}
        return Job("front", "front", spec, self.code.hash("papers.cli.front"), self._path("front"))

    def train_at(self, parts: Any) -> Job:
        """The training job that the wildcards of a path name; it need not be one that a study asks for."""
        batch = parts.batch if parts.batch == "full" else int(parts.batch)
        return self.train(Run(parts.dataset, parts.model, parts.optimizer, batch, float(parts.lr), int(parts.seed)))

    def planned(self, jobs: Iterable[Any]) -> Iterator[Job]:
        """What the plan knows of jobs of Snakemake that train or measure."""
        for job in jobs:
            if job.rule.name == "train":
                yield self.train_at(job.wildcards)
            elif job.rule.name == "measure":
                yield self.measure(job.wildcards.measure)

    def resource(self, stage: str, name: str, default: int) -> int:
        return self.config.get("resources", {}).get(stage, {}).get(name, default)

    def source_options(self) -> str:
        """Options of the data command that say where data may come from: no part of what the data is."""
        block = self.config["data"]
        words = ["--sources", ",".join(block["sources"])]
        words += ["--offline"] if block.get("offline") else []
        words += ["--folder", block["folder"]] if block.get("folder") else []
        return shlex.join(words)

    def category(self, id: str) -> str:
        """Where an artefact stands in the report."""
        paper = self._artefact(id).paper
        return PAPERS.get(paper, paper or "Results")

    def labels(self, id: str) -> dict[str, str]:
        """What the report's list says of an artefact."""
        artefact = self._artefact(id)
        return {"id": artefact.id, "title": artefact.title, **artefact.labels}

    @property
    def captions(self) -> dict[str, str]:
        """The captions by artefact, for the report's template."""
        return {artefact.id: artefact.caption for artefact in self.study.artefacts}

    def spec(self, job: Job) -> str:
        """The file that tells a job what to do, written if it is not there."""
        return spec_files.of_job(job, "data" if job.stage == "data" else self.results)

    def config_file(self) -> str:
        """The whole config in a file."""
        return spec_files.write(f"{self.results}/.specs/config", canonical(self.config))

    @cached_property
    def _prepared(self) -> dict[str, str]:
        """Folders of all data sets of the config, those first that the studies need, each with its entry."""
        return {**{self.data_folder(name): name for name in self.config["datasets"]}, **self.datasets}

    @cached_property
    def _measures(self) -> dict[str, Measure]:
        return {measure.name: measure for measure in self.study.measures}

    @cached_property
    def _artefacts(self) -> dict[str, Artefact]:
        return {artefact.id: artefact for artefact in self.study.artefacts}

    def _artefact(self, id: str) -> Artefact:
        return self._listed(self._artefacts, id, "figure or table")

    def _listed(self, table: Mapping[str, Any], name: str, kind: str) -> Any:
        if name not in table:
            near = difflib.get_close_matches(name, table, 3, 0.4)
            hint = f"; there is: {', '.join(near)}" if near else ""
            raise StudyError(f"no study of this config has the {kind} {name!r}{hint}")
        return table[name]

    def _path(self, path: str, separator: str = ".run") -> str:
        return f"{self.results}/{path}{separator}.json"

    def _block(self, section: str, name: str) -> Mapping[str, Any]:
        if name not in self.config[section]:
            known = ", ".join(sorted(self.config[section])) or "none"
            raise StudyError(f"{section} has no {name!r}, which a study asks for; there are: {known}")
        return self.config[section][name]

    def _named(self, section: str, name: str) -> dict[str, Any]:
        return {**self._block(section, name), "name": name}

    def _code(self, roots: list[str], blocks: Any) -> str:
        return self.code.hash(*roots, *(root for kind in _kinds(blocks) for root in self._modules(kind)))

    def _modules(self, kind: str) -> list[str]:
        """The module that a kind of optimiser or model is loaded from, and its entry in the registry.

        A kind that is in no registry may be a class of optimisers from elsewhere, which one of ours wraps.
        """
        found = [table[kind] for table in self._registered.values() if kind in table] or [kind, WRAPPER]
        return [part for target in found if ":" in target for part in (target.partition(":")[0], target)]

    @cached_property
    def _registered(self) -> dict[str, dict[str, str]]:
        return {name: self.code.table(module, "KINDS") for name, module in REGISTRIES.items()}


def _kinds(value: Any) -> Iterable[str]:
    """All values of keys ``kind`` in nested settings, sorted."""
    if isinstance(value, Mapping):
        own = {value["kind"]} if isinstance(value.get("kind"), str) else set()
        return sorted(own.union(*(_kinds(inner) for inner in value.values())))
    if isinstance(value, list | tuple):
        return sorted(set().union(*(_kinds(inner) for inner in value)))
    return []
