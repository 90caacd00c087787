"""The claims ledger: each checkable statement of the papers, what was measured, and whether it held.

A claim is data (one entry of a ``claims.yaml``); its verdict is a rule of :mod:`papers.common.verdicts` or of the
``verdicts.py`` beside the file, or ``module:function`` of the reader's own. No torch here.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from curvspace.errors import UserError
from papers.common import verdicts, yaml_files
from papers.common.outcomes import UNTESTED, VERDICTS, Outcome, Untested, number
from papers.common.study import published

COLUMNS = (
    *("id", "paper", "where", "statement", "reference", "measured", "value", "low", "high"),
    *("seeds", "scale", "verdict", "needs", "figure"),
)


@dataclass(frozen=True)
class Claim:
    """One statement that a measurement can confirm or refute.

    where: section, figure or table of the paper. reference: the paper's own number, as text. reads: label ->
    sources of tables (an artefact's id, ``ID[label]`` if it is about the rows of one input, ``ID:label`` or
    ``ID:*`` for what feeds it, ``measure:pattern``). rule and options: how the verdict is reached. requires: the
    least scale at which it means something. needs: that, in words.
    """

    id: str
    paper: str
    where: str
    statement: str
    reference: str
    reads: Mapping[str, Any]
    rule: str
    needs: str
    options: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    figure: str = ""

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """Sources by label."""
        return {label: (s,) if isinstance(s, str) else tuple(s) for label, s in self.reads.items()}


def load(files: Iterable[Path]) -> list[Claim]:
    """The claims of several files, by paper and number; what is wrong with one is a ``UserError`` that names it."""
    found: dict[str, Claim] = {}
    for file in files:
        try:
            written = entries(file)
        except yaml.YAMLError as error:
            raise UserError(f"{file} is not readable as YAML: {' '.join(str(error).split())}") from None
        beside = file.with_name("verdicts.py").is_file()
        for claim in parse(written, f"papers.{file.absolute().parent.name}.verdicts" if beside else ""):
            if claim.id in found:
                raise UserError(f"claim {claim.id} stands in two files, {file} being the second")
            found[claim.id] = claim
    return sorted(found.values(), key=lambda claim: (claim.paper, _number(claim.id)))


def entries(file: Path) -> Any:
    """The content of a file of claims, each entry with ``each`` in as many as it stands for.

    ``each`` has lists of mappings, of which every combination is one claim; ``published`` is a path, a/b/c, in the
    ``published.yaml`` beside the file, or / for all of it. Their names, and ``number``, from 1, stand in braces in the
    entry's texts ({mean}, or {sums[0][value]} of what lies deeper); a text that is such a name alone becomes its value.
    An entry with neither is taken as it stands.
    """
    written = yaml_files.read(file)
    if not isinstance(written, list):
        return written
    numbers = published(file)
    return [one for entry in written for one in _expanded(entry, numbers)]


def _expanded(entry: Any, numbers: Mapping[str, Any]) -> list[Any]:
    if not isinstance(entry, Mapping) or not {"each", "published"} & set(entry):
        return [entry]
    rest = {key: value for key, value in entry.items() if key not in ("each", "published")}
    found = []
    for place, parts in enumerate(itertools.product(*entry.get("each", {}).values()), start=1):
        names: dict[str, Any] = {"number": place}
        for part in parts:
            names |= part
        cell: Any = numbers if "published" in entry else {}
        for key in filter(None, entry.get("published", "").format(**names).split("/")):
            cell = cell[key]
        found.append(_filled(rest, names | cell))
    return found


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """A value with the names in braces replaced, at any depth."""
    if isinstance(value, Mapping):
        return {key: _filled(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, names) for inner in value]
    if not isinstance(value, str):
        return value
    alone = re.fullmatch(r"{(\w+)}", value)
    return names[alone[1]] if alone else value.format(**names)


def _number(name: str) -> int:
    """10 of A10."""
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 0


def parse(entries: Any, own: str = "") -> list[Claim]:
    """Claims of a parsed YAML file; a wrong entry is a ``UserError`` that names it.

    own: the module in which a rule's bare name is looked up before the general rules.
    """
    if not isinstance(entries, list):
        raise UserError("the claims file must be a list of claims")
    allowed = {f.name for f in fields(Claim)}
    found: dict[str, Claim] = {}
    for place, entry in enumerate(entries, start=1):
        name = entry.get("id", f"entry {place}") if isinstance(entry, Mapping) else f"entry {place}"
        if not isinstance(entry, Mapping):
            raise UserError(f"claim {name} must be a mapping")
        if unknown := sorted(set(entry) - allowed):
            raise UserError(f"claim {name}: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")
        try:
            claim = Claim(**entry)
        except TypeError as error:
            raise UserError(f"claim {name}: {str(error).rpartition('__init__() ')[2]}") from None
        if name in found:
            raise UserError(f"claim {name} stands in the file twice")
        if own and ":" not in claim.rule and hasattr(importlib.import_module(own), claim.rule):
            claim = replace(claim, rule=f"{own}:{claim.rule}")
        rule_of(claim.rule)
        found[name] = claim
    return list(found.values())


def rule_of(name: str) -> Callable[..., Outcome]:
    """A general rule by its name, or ``module:function``."""
    if ":" in name:
        module_name, _, function = name.partition(":")
        try:
            rule = getattr(importlib.import_module(module_name), function, None)
        except ModuleNotFoundError:
            rule = None
    else:
        rule = getattr(verdicts, name, None)
    if not callable(rule):
        raise UserError(f"there is no verdict rule {name!r}")
    return rule


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several tables as one; empty ones (of runs or measures without a row) add nothing."""
    filled = [table for table in tables if len(table)] or list(tables[:1])
    return filled[0] if len(filled) == 1 else pd.concat(filled, ignore_index=True)


def row(
    claim: Claim,
    tables: Mapping[str, pd.DataFrame],
    scale: str = "",
    short: str = "",
    link: str = "",
    words: Mapping[str, str] | None = None,
) -> dict:
    """One row of the ledger.

    tables: by the claim's labels; a label that is missing means that its tables are not in the graph. short: why this
    scale is too small for a verdict; what was measured is listed all the same. words: how a reader knows the
    networks and data sets.
    """
    common = {
        **{key: getattr(claim, key) for key in ("id", "paper", "where", "statement", "reference")},
        **{"measured": "", "value": math.nan, "low": math.nan, "high": math.nan, "seeds": 0},
        **{"scale": scale, "verdict": UNTESTED, "needs": claim.needs, "figure": link},
    }
    if missing := [label for label in claim.sources if label not in tables]:
        return {**common, "scale": "", "measured": f"no table for {missing[0]}"}
    try:
        outcome = rule_of(claim.rule)(tables, **claim.options)
    except Untested as reason:
        return {**common, "measured": str(reason)}
    if counts := _parameters(about(tables.values(), claim.options.get("where", {}))):
        common["scale"] = f"{scale}; {counts}"
    decided = outcome.deciding.estimate
    measured = {
        "measured": worded(outcome.measured, words or {}),
        "value": decided.value,
        "low": decided.low,
        "high": decided.high,
    }
    verdict = UNTESTED if short else outcome.verdict
    needs = f"{claim.needs} (here: {short})" if short else ""
    return {**common, **measured, "seeds": outcome.seeds, "verdict": verdict, "needs": needs}


def worded(text: str, words: Mapping[str, str]) -> str:
    """A text with the names of networks and data sets in words."""
    if not words:
        return text
    names = "|".join(re.escape(name) for name in sorted(words, key=len, reverse=True))
    return re.sub(rf"(?<![\w-])({names})(?![\w-])", lambda found: words[found[0]], text)


def about(tables: Iterable[pd.DataFrame], where: Mapping[str, Any]) -> list[pd.DataFrame]:
    """The rows of each table that a claim is about; none of one that has none of them."""
    found = []
    for table in tables:
        try:
            found.append(verdicts.pick({"": table}, where=where) if set(where) <= set(table) else table)
        except Untested:
            continue
    return found


def _parameters(tables: Iterable[pd.DataFrame]) -> str:
    """How many parameters the networks have, where the tables say so."""
    known = {int(n) for table in tables if "parameters" in table for n in table["parameters"].dropna().unique()}
    words = [f"{n / 1e6:.1f} M" if n >= 1e6 else number(float(n)) for n in sorted(known)]
    return f"{' or '.join(words)} parameters" if 0 < len(words) <= 3 else ""


def table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The ledger, in the order of the file."""
    return pd.DataFrame(list(rows), columns=list(COLUMNS))


def records(ledger: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [{str(key): value for key, value in entry.items()} for entry in ledger.to_dict("records")]


def counts(ledger: pd.DataFrame) -> dict[str, int]:
    """How many claims have each verdict."""
    found = ledger["verdict"].value_counts()
    return {verdict: int(found.get(verdict, 0)) for verdict in VERDICTS}


def markdown(ledger: pd.DataFrame) -> str:
    """The ledger for reading, one section a paper."""
    lines = ["# Claims ledger", "", summary(ledger), ""]
    for paper, part in ledger.groupby("paper", sort=False):
        lines += [f"## Paper {paper}" if len(str(paper)) == 1 else f"## {paper}", ""]
        lines += ["| id | statement | where | reference | measured | seeds | scale | verdict |", "|" + " --- |" * 8]
        for claim in records(part):
            identity = f"[{claim['id']}]({claim['figure']})" if claim["figure"] else claim["id"]
            keys = ("statement", "where", "reference", "measured", "seeds", "scale")
            cells = [identity, *(plain(claim[key]) for key in keys), plain(_verdict(claim))]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def summary(ledger: pd.DataFrame) -> str:
    """How many claims there are, and how many of each verdict."""
    parts = [f"{n} {verdict}" for verdict, n in counts(ledger).items()]
    return f"{len(ledger)} claims: {', '.join(parts)}."


def _verdict(claim: Mapping[str, Any]) -> str:
    return f"{claim['verdict']}; needs {claim['needs']}" if claim["verdict"] == UNTESTED else str(claim["verdict"])


def plain(value: Any) -> str:
    """One line without a bar that would end the cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
