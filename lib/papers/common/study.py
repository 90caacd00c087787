"""What a study is made of: training runs, measures on them, and the figures and tables drawn from the measures.

A study is a module ``study.py`` in a folder of its own with a function ``declare(config) -> Study``. It only *lists*
what it needs; paths, job specs and rules follow from the list. Equal runs of two studies are one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from papers.common import yaml_files

NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
"""What data sets, models, optimisers, measures, figures and tables may be called: names of files on every system."""


class StudyError(ValueError):
    """A study or the config names something that does not exist; the message is one line for the user."""


def _check_name(kind: str, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise StudyError(f"{kind} {name!r} is no name; allowed: letters, digits and . _ + -, a letter or digit first")


def number_text(value: float) -> str:
    """The shortest text of a number that reads back as the same number: 0.1, 1, 1e-05."""
    short = format(float(value), "g")
    return short if float(short) == float(value) else repr(float(value))


def published(file: str | Path) -> dict[str, Any]:
    """The paper's own numbers: ``published.yaml`` beside a file; empty where there is none."""
    place = Path(file).with_name("published.yaml")
    return yaml_files.read(place) if place.is_file() else {}


@dataclass(frozen=True)
class Run:
    """One training run: data set, model and optimiser by their names in the config.

    ``batch`` is a number of examples or ``"full"``. How long the run is and what it records is the config's task
    of ``dataset/model``.
    """

    dataset: str
    model: str
    optimizer: str
    batch: int | str
    lr: float
    seed: int

    def __post_init__(self) -> None:
        for kind in ("dataset", "model", "optimizer"):
            _check_name(kind, getattr(self, kind))

    @property
    def path(self) -> str:
        """Folder of the run below the results folder."""
        leaf = f"bs{self.batch}-lr{number_text(self.lr)}-seed{self.seed}"
        return f"runs/{self.dataset}/{self.model}/{self.optimizer}/{leaf}"

    @property
    def table(self) -> str:
        """The run's table of metrics, below the results folder."""
        return f"{self.path}/metrics.csv"


@dataclass(frozen=True)
class Measure:
    """One job which turns finished runs (or data sets alone) into one tidy table.

    ``function`` is ``module:function`` with the signature ``f(context, **spec) -> DataFrame``.
    """

    name: str
    function: str
    runs: tuple[Run, ...] = ()
    datasets: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for part in self.name.split("/"):
            _check_name("measure", part)
        object.__setattr__(self, "runs", tuple(self.runs))
        object.__setattr__(self, "datasets", tuple(self.datasets))

    @property
    def path(self) -> str:
        """Path below the results folder, without a suffix."""
        return f"measures/{self.name}"

    @property
    def table(self) -> str:
        """The measure's table, below the results folder."""
        return f"{self.path}.csv"


Source = Run | Measure


@dataclass(frozen=True)
class Artefact:
    """One figure or one table of the results, drawn from tables alone.

    ``function`` is ``module:function``: for a figure ``f(tables, style, **spec) -> (Figure, DataFrame drawn)``, for a
    table ``f(tables, **spec) -> DataFrame``. ``inputs`` maps the label of each table to the run or measure, or the
    several of them, whose tables are concatenated under it; it is kept as tuples. ``caption`` is its text in the
    report, filled in from the folder's ``captions.yaml``.
    """

    id: str
    kind: str
    function: str
    inputs: Mapping[str, Any] = field(hash=False)
    spec: Mapping[str, Any] = field(default_factory=dict, hash=False)
    paper: str = ""
    title: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    caption: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("figure", "table"):
            raise StudyError(f"artefact {self.id}: kind is {self.kind!r}; allowed: figure, table")
        _check_name(self.kind, self.id)
        inputs = {label: _sources(value) for label, value in self.inputs.items()}
        object.__setattr__(self, "inputs", inputs)

    @property
    def path(self) -> str:
        """Path below the results folder, without a suffix."""
        return f"{self.kind}s/{self.id}"

    @property
    def files(self) -> list[str]:
        """All tables that it is drawn from, each once, below the results folder."""
        return list(dict.fromkeys(source.table for source in self.sources))

    @property
    def sources(self) -> tuple[Source, ...]:
        """All runs and measures it is drawn from."""
        return tuple(source for sources in self.inputs.values() for source in sources)


def _sources(value: Source | Iterable[Source]) -> tuple[Source, ...]:
    return (value,) if isinstance(value, Run | Measure) else tuple(value)


@dataclass
class Study:
    """What one study (or all together) asks for. Runs and measures that others name are added by ``close``."""

    runs: list[Run] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    artefacts: list[Artefact] = field(default_factory=list)

    def close(self) -> Study:
        """The study with every run and measure that its artefacts and measures name, each listed once."""
        artefacts = _unique(self.artefacts, key=lambda a: a.id)
        named = [s for a in artefacts for s in a.sources]
        measures = _unique([*self.measures, *(s for s in named if isinstance(s, Measure))], key=lambda m: m.name)
        runs = [*self.runs, *(r for m in measures for r in m.runs), *(s for s in named if isinstance(s, Run))]
        return Study(_unique(runs, key=lambda r: r.path), measures, artefacts)


def _unique(items: Iterable[Any], key: Any) -> list[Any]:
    """The items in order, each once; two different items of one key are an error."""
    seen: dict[str, Any] = {}
    for item in items:
        if seen.setdefault(key(item), item) != item:
            raise StudyError(f"two different declarations of {key(item)}")
    return list(seen.values())
