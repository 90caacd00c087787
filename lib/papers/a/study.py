"""Paper A: Newton's method in the class-gradient subspace. What the study asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from papers.common.study import Artefact, Measure, Run, Study, published

FIGURES = "papers.a.figures"
TABLES = "papers.a.tables"
MEASURES = "papers.a.measures"
PUBLISHED = published(__file__)


def declare(config: Mapping[str, Any]) -> Study:
    """A-F1 … A-X1, A-R at the scale of ``studies.a``."""
    a = config["studies"]["a"]
    return Study(artefacts=[*_learning_rates(a), *_batch_sizes(a), *_subspaces(a), _diagnosis(a), *_readings(a)])


def _optimizers(a: Mapping[str, Any]) -> list[str]:
    """The paper's method in its readings, the one that meets most first, each after SGD with the same momentum."""
    return list(dict.fromkeys(name for method, sgd in a["newton"].items() for name in (sgd, method)))


def _with_seeds(block: Mapping[str, Any], key: str, optimizer: str) -> list[tuple[Any, int]]:
    """(value, seed) for the block's values of the key and its seeds, then for those of ``also``, of this optimiser."""
    return [
        (value, seed)
        for part in (block, block.get("also", {}))
        if optimizer in part.get("optimizers", [optimizer])
        for value in part.get(key, [])
        for seed in part["seeds"]
    ]


def _learning_rates(a: Mapping[str, Any]) -> list[Artefact]:
    block = a["learning_rates"]

    def run(optimizer: str, lr: float, seed: int) -> Run:
        return Run(block["dataset"], block["model"], optimizer, block["batch_size"], lr, seed)

    labels = {"data": block["dataset"], "model": block["model"]}
    runs = tuple(run(name, lr, seed) for name in _optimizers(a) for lr, seed in _with_seeds(block, "lrs", name))
    highest = tuple(one for one in runs if one.lr == max(block["lrs"]))
    above = tuple(run(name, lr, block["seeds"][0]) for name in _optimizers(a) for lr in block["diverging_lrs"])
    accuracy = f"{TABLES}:accuracy_by_lr"
    return [
        Artefact(
            "A-F1",
            "figure",
            f"{FIGURES}:loss_over_training",
            {"runs": highest},
            paper="A",
            title="Validation loss of SGD and class-gradient Newton",
            labels=labels,
        ),
        Artefact(
            "A-T1",
            "table",
            accuracy,
            {"runs": runs},
            spec={"published": PUBLISHED},
            paper="A",
            title="Validation accuracy by learning rate",
            labels=labels,
        ),
        Artefact(
            "A-T2",
            "table",
            f"{TABLES}:loss_by_lr",
            {"runs": runs},
            spec={"published": PUBLISHED},
            paper="A",
            title="Validation loss by learning rate",
            labels=labels,
        ),
        Artefact(
            "A-D",
            "table",
            f"{TABLES}:divergence",
            {"runs": above},
            paper="A",
            title="Divergence above the paper's learning rate",
            labels=labels,
        ),
    ]


def _batch_sizes(a: Mapping[str, Any]) -> list[Artefact]:
    block = a["batch_sizes"]
    runs = tuple(
        Run(block["dataset"], block["model"], optimizer, size, block["lr"], seed)
        for optimizer in _optimizers(a)
        for size, seed in _with_seeds(block, "sizes", optimizer)
    )
    labels = {"data": block["dataset"], "model": block["model"]}
    spec = {"pairs": a["newton"]}
    return [
        Artefact(
            "A-F2",
            "figure",
            f"{FIGURES}:loss_by_batch_size",
            {"runs": runs},
            spec=spec,
            paper="A",
            title="Loss by batch size, with the crossover",
            labels=labels,
        )
    ]


def _subspaces(a: Mapping[str, Any]) -> list[Artefact]:
    block = a["subspace"]
    run = Run(block["dataset"], block["model"], a["first_order"], block["batch_size"], block["lr"], block["seed"])
    common = {"examples": block["examples"], "tol": block["tol"]}
    spectrum = Measure("a/spectrum", f"{MEASURES}:spectrum", (run,), spec={**common, "k": block["k"]})
    span_spec = {**common, "minibatch": block["batch_size"], "tolerances": block["tolerances"]}
    span = Measure("a/span", f"{MEASURES}:span_along_training", (run,), spec=span_spec)
    cosines = Measure("a/cosines", f"{MEASURES}:cosines", (run,), spec=common)
    labels = {"data": block["dataset"], "model": block["model"]}
    figures = [
        ("A-F3", "top_eigenvalues", spectrum, "Top eigenvalues of the Hessian after training"),
        ("A-F4a", "rank_of_union", span, "Rank of class gradients and eigenvectors together"),
        ("A-F4b", "cosine_matrix", cosines, "Cosines between class gradients and eigenvectors"),
    ]
    return [
        Artefact(id, "figure", f"{FIGURES}:{name}", {"measure": (measure,)}, paper="A", title=title, labels=labels)
        for id, name, measure, title in figures
    ]


def _diagnosis(a: Mapping[str, Any]) -> Artefact:
    measures = []
    for block in a["diagnosis"]:
        run = Run(block["dataset"], block["model"], block["optimizer"], block["batch_size"], block["lr"], block["seed"])
        spec = {key: block[key] for key in ("examples", "trace_products", "batch_norm", "tol", "steps") if key in block}
        name = f"a/diagnosis/{run.dataset}-{run.model}-{run.optimizer}" + (f"-seed{run.seed}" if run.seed else "")
        measures.append(Measure(name, f"{MEASURES}:diagnosis", (run,), spec=spec))
    return Artefact(
        "A-X1",
        "figure",
        f"{FIGURES}:diagnosis",
        {"measure": tuple(measures)},
        paper="A",
        title="What eq. 12 claims of the span, and what holds",
    )


def _readings(a: Mapping[str, Any]) -> list[Artefact]:
    """A-R, A-R1, A-R2: every reading of the method, held against the paper's statements."""
    block = a["readings"]
    rates, screened = block["learning_rates"], block.get("screened", {})
    pairs = {sgd: [*readings, *screened.get(sgd, [])] for sgd, readings in block["pairs"].items()}
    above = [(lr, seed) for lr in rates["diverging_lrs"] for seed in rates["seeds"]]

    def at(part: Mapping[str, Any], optimizer: str, size: int | str, lr: float, seed: int) -> Run:
        return Run(part["dataset"], part["model"], optimizer, size, lr, seed)

    full = [name for sgd, readings in block["pairs"].items() for name in (sgd, *readings)]
    runs = [
        at(rates, name, rates["batch_size"], lr, seed)
        for name in full
        for lr, seed in [*_with_seeds(rates, "lrs", name), *above]
    ]
    for name in (name for readings in screened.values() for name in readings):
        runs.append(at(rates, name, rates["batch_size"], max(rates["lrs"]), rates["seeds"][0]))
    batches = [
        at(part, name, size, part["lr"], seed)
        for part in block["batch_sizes"]
        for name in full
        for size, seed in _with_seeds(part, "sizes", name)
    ]
    inputs = {"rates": tuple(runs), "batches": tuple(batches)}
    spec = {"pairs": pairs, "above": max(rates["lrs"])}
    labels = {"data": rates["dataset"], "model": rates["model"]}
    return [
        Artefact(id, kind, f"papers.a.{function}", inputs, spec=spec, paper="A", title=title, labels=labels)
        for id, kind, function, title in (
            ("A-R", "figure", "figures_readings:curves_by_reading", "Validation loss by reading of the method"),
            ("A-R1", "table", "readings:readings_by_statement", "Readings of the method by the paper's statements"),
            ("A-R2", "table", "readings:judgements", "The same as numbers, one row a reading and statement"),
        )
    ]
