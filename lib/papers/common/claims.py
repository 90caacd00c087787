"""The claims of the papers bound to one config: which tables each reads here, and at what scale they were made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from papers.common.study import Artefact, Measure, Run, Source, Study

WORDS = {
    **{"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"},
    **{"digits": "the embedded digits", "sine": "a noisy sine", "lenet": "LeNet", "fc": "fully connected network"},
    **{"resnet9": "ResNet9", "resnet18": "ResNet-18", "convnet": "ConvNet", "softmax": "softmax regression"},
    **{"cnn-400": "CNN-400", "cnn-60k": "CNN-60k", "cnn-222": "CNN-222", "vgg-f": "VGG-f", "mlp-tanh": "MLP"},
    **{"cifar-basic": "basic CNN"},
}
"""Sources of data and kinds of networks as a reader knows them; others keep their name."""
WHOLE = 50_000
"""Training examples of a data set that is not cut down, for comparing sizes of runs."""
PAGES = {"figure": ".png", "table": ".html"}


def bind(entries: Iterable[Mapping[str, Any]], study: Study, config: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of the ledger's job: ``sources`` (tables below the results folder), and by claim ``scale``, ``size``
    (training examples times epochs, of the largest run; without runs, how often a problem is repeated), ``models``
    (the networks of its runs), ``parts`` and ``examples`` (of which data set and network each part of the scale is,
    :func:`in_words`), ``words`` (networks and data sets as a reader knows them), ``short`` and ``link``.

    A source that the graph does not have is left out. ``short`` says which part of a claim's ``requires`` this config
    does not reach.
    """
    spec: dict[str, dict[str, Any]] = {"sources": {}, "scale": {}, "size": {}, "models": {}, "parts": {}}
    spec |= {"examples": {}, "words": {}, "short": {}, "link": {}}
    artefacts = {artefact.id: artefact for artefact in study.artefacts}
    for entry in entries:
        behind: list[Source] = []
        for source in _listed(entry["reads"].values()):
            if found := _resolve(source, study, artefacts):
                spec["sources"][source] = [table for table, _ in found]
                behind += [s for _, sources in found for s in sources]
        if not behind:
            continue
        where = entry.get("options", {}).get("where", {})
        behind = [source for source in behind if _meant(source, where)] or behind
        runs, datasets = _behind(behind)
        parts, examples = _scale(runs, config) | _own_training(behind, config), _examples(behind)
        spec["parts"][entry["id"]], spec["examples"][entry["id"]] = parts, examples
        spec["scale"][entry["id"]] = f"{config['scale']}: {in_words(parts, examples)}"
        spec["size"][entry["id"]] = max((_size(run, config) for run in runs), default=_repeats(behind))
        models = spec["models"][entry["id"]] = list(dict.fromkeys(run.model for run in runs))
        own = [s.spec["model"]["name"] for s in behind if isinstance(s, Measure) and "task" in s.spec]
        spec["words"][entry["id"]] = _words([*(run.dataset for run in runs), *datasets], [*models, *own], config)
        if short := _short(entry.get("requires", {}), runs, datasets, config):
            spec["short"][entry["id"]] = short
        if artefact := artefacts.get(entry.get("figure", "")):
            spec["link"][entry["id"]] = artefact.path + PAGES[artefact.kind]
    return spec


def in_words(parts: Iterable[str], examples: Mapping[str, Iterable[int]]) -> str:
    """The scale of a claim: its ``parts``, and how many examples the curvature of each network was measured on."""
    counts = sorted({n for part in examples.values() for n in part})
    curvature = [f"curvature on {' or '.join(f'{n:,}' for n in counts)} examples"] if counts else []
    return "; ".join([*parts, *curvature]) or "generated data"


def tables(spec: Mapping[str, Any]) -> list[str]:
    """All tables that the ledger reads, each once, below the results folder."""
    return list(dict.fromkeys(table for found in spec["sources"].values() for table in found))


def _listed(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        yield from [value] if isinstance(value, str) else value


def _resolve(source: str, study: Study, artefacts: Mapping[str, Artefact]) -> list[tuple[str, list[Source]]]:
    """(table, runs and measures behind it) for ``ID``, ``ID[label]``, ``ID:label`` (``*``: all), ``measure:pattern``.

    Empty if the graph does not have it.
    """
    if source.endswith("]"):
        whole, _, label = source[:-1].partition("[")
        return [(table, list(artefacts[whole].inputs.get(label, ()))) for table, _ in _resolve(whole, study, artefacts)]
    kind, _, rest = source.partition(":")
    if kind == "measure":
        return [(m.table, [m]) for m in study.measures if fnmatchcase(m.name, rest)]
    artefact = artefacts.get(kind)
    if artefact is None:
        return []
    if not rest:
        return [(f"{artefact.path}.csv", list(artefact.sources))]
    return [(s.table, [s]) for s in (artefact.sources if rest == "*" else artefact.inputs.get(rest, ()))]


def _meant(source: Source, where: Mapping[str, Any]) -> bool:
    """Whether a claim about the rows ``where`` (a value or a list for each column) can be about this run or measure."""
    own: dict[str, Any]
    if isinstance(source, Run):
        own = {"dataset": source.dataset, "model": source.model, "optimizer": source.optimizer}
    else:
        blocks = {column: source.spec.get(column) for column in ("dataset", "model", "optimizer")}
        own = {column: block["name"] if isinstance(block, Mapping) else block for column, block in blocks.items()}
    wanted = {column: value for column, value in where.items() if own.get(column) and not isinstance(value, Mapping)}
    return all(own[column] in _listed([value]) for column, value in wanted.items())


def _behind(sources: Iterable[Source]) -> tuple[list[Run], list[str]]:
    """The training runs behind some sources, and the data sets of measures that need none."""
    runs: dict[str, Run] = {}
    datasets: dict[str, None] = {}
    for source in sources:
        if isinstance(source, Measure):
            datasets |= dict.fromkeys(source.datasets)
            runs |= {run.path: run for run in source.runs}
        else:
            runs[source.path] = source
    return list(runs.values()), list(datasets)


def _scale(runs: list[Run], config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """What was run, in words (networks, data, epochs, learning rates if they are few): the data sets and networks."""
    pairs: dict[tuple[str, str], set[float]] = {}
    for run in runs:
        pairs.setdefault((run.dataset, run.model), set()).add(run.lr)
    parts: dict[str, list[tuple[str, str]]] = {}
    for (dataset, model), lrs in pairs.items():
        words = f"{_model(model, config)} on {_data(dataset, config)}, {_length(dataset, model, config)}{_rates(lrs)}"
        parts.setdefault(words, []).append((dataset, model))
    return parts


def _rates(lrs: set[float]) -> str:
    return f", η = {' or '.join(f'{lr:g}' for lr in sorted(lrs))}" if len(lrs) <= 3 else ""


def _own_training(sources: Iterable[Source], config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Measures that train networks themselves (the tournament): which, on what, and for how long; as :func:`_scale`."""
    found: dict[str, list[tuple[str, str]]] = {}
    for source in sources:
        if isinstance(source, Measure) and {"model", "task"} <= set(source.spec):
            model, epochs = source.spec["model"]["name"], source.spec["task"]["epochs"]
            for name in source.datasets:
                words = f"{_model(model, config)} on {_data(name, config)}, {epochs:g} epochs"
                found.setdefault(words, []).append((name, model))
    return found


def _examples(sources: Iterable[Source]) -> dict[str, list[int]]:
    """How many examples the curvature was measured on, by network (empty where a measure has no run)."""
    found: dict[str, list[int]] = {}
    for source in sources:
        if isinstance(source, Measure) and source.spec.get("examples"):
            for model in {run.model for run in source.runs} or {""}:
                found.setdefault(model, []).append(source.spec["examples"])
    return found


def _data(name: str, config: Mapping[str, Any]) -> str:
    block = config["datasets"][name]
    uneven = block.get("imbalance", 1) > 1  # how many examples are left then, the data set alone knows
    size = f"{block['train']:,} examples of " if isinstance(block.get("train"), int) and not uneven else ""
    classes = f" imbalanced {block['imbalance']:g} to 1" if uneven else ""
    labels = "" if block.get("labels", "true") in ("true", True) else f" ({block['labels']} labels)"
    pixels = f" at {block['resize']} × {block['resize']} pixels" if block.get("resize") else ""
    return f"{size}{WORDS.get(block['source'], block['source'])}{classes}{pixels}{labels}"


def _model(name: str, config: Mapping[str, Any]) -> str:
    block = config["models"][name]
    width = f" of width {block['width']}" if "width" in block else ""
    norm = " with batch normalisation" if block.get("batch_norm") is True else ""
    return f"{WORDS[block['kind']]}{width}{norm}" if block["kind"] in WORDS else name


def _words(datasets: Iterable[str], models: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The networks and data sets of one claim by their names; two that share their words keep their names."""
    named = {name: _data(name, config) for name in datasets} | {name: _model(name, config) for name in models}
    known = Counter(named.values())
    return {name: words for name, words in named.items() if known[words] == 1 and words != name}


def _repeats(sources: Iterable[Source]) -> float:
    """How often the measures that need no run repeat what they do."""
    return max((float(s.spec.get("runs", 0)) for s in sources if isinstance(s, Measure)), default=0.0)


def _size(run: Run, config: Mapping[str, Any]) -> float:
    epochs = config["tasks"][f"{run.dataset}/{run.model}"]["epochs"]
    return float(_train(run, config)) * float(epochs)


def _train(run: Run, config: Mapping[str, Any]) -> int:
    train = config["datasets"][run.dataset].get("train")
    return train if isinstance(train, int) else WHOLE


def _epochs(run: Run, config: Mapping[str, Any]) -> float:
    """The task's epochs, or the fewer that its ``max_steps`` leave of them."""
    task, examples = config["tasks"][f"{run.dataset}/{run.model}"], _train(run, config)
    per_epoch = 1 if run.batch == "full" else -(-examples // int(run.batch))
    return min(task["epochs"], (task.get("max_steps") or math.inf) / per_epoch)


def _length(dataset: str, model: str, config: Mapping[str, Any]) -> str:
    task = config["tasks"][f"{dataset}/{model}"]
    epochs = f"{task['epochs']:g} epoch{'' if task['epochs'] == 1 else 's'}"
    if task.get("min_steps"):
        epochs += f" or {task['min_steps']} steps"
    return f"{epochs}, at most {task['max_steps']} steps" if task.get("max_steps") else epochs


def _short(requires: Mapping[str, Any], runs: list[Run], datasets: list[str], config: Mapping[str, Any]) -> str:
    """What the claim requires and this config does not have; empty if it has all.

    ``data``: original data sets, all of which must be there, and no embedded digits besides. ``train``, ``epochs``
    (steps that cut a run short shorten them), ``seeds`` (of a setting): the least of each. ``models: {kind: {option:
    value}}``: parameters of a model block.
    """
    names = {run.dataset for run in runs} | set(datasets)
    blocks = [config["datasets"][name] for name in sorted(names)]
    sources = {block["source"] for block in blocks}
    missing = []
    wanted = list(_listed([requires.get("data", [])]))
    if absent := [d for d in wanted if d not in sources]:
        missing.append(f"{', '.join(sorted(sources)) or 'no data'} instead of {', '.join(absent)}")
    elif wanted and "digits" in sources.difference(wanted):
        missing.append("digits besides")
    sizes = [block["train"] for block in blocks if isinstance(block.get("train"), int)]
    if sizes and min(sizes) < requires.get("train", 0):
        missing.append(f"{min(sizes):,} training examples")
    epochs = [_epochs(run, config) for run in runs]
    if epochs and min(epochs) < requires.get("epochs", 0):
        missing.append(f"{min(epochs):g} epochs")
    seeds = Counter((run.dataset, run.model, run.optimizer, run.batch, run.lr) for run in runs)
    if (fewest := min(seeds.values(), default=0)) < requires.get("seeds", 0):
        missing.append(f"{fewest} seeds")
    models = [config["models"][run.model] for run in runs]
    for kind, options in requires.get("models", {}).items():
        if not any(m["kind"] == kind and all(m.get(k, v) == v for k, v in options.items()) for m in models):
            missing.append(f"no {kind} of full size")
    return ", ".join(missing)
