"""Paper B: gradient descent happens in a tiny subspace. What the study asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from papers.common.study import Artefact, Measure, Run, Source, Study, published

FIGURES = "papers.b.figures"
SPECTRA_FIGURES = "papers.b.figures_spectra"
TOY_FIGURES = "papers.b.figures_toy"
TABLES = "papers.b.tables"
MEASURES = "papers.b.measures"
SPECTRA = "papers.b.measures_spectra"
TOY = "papers.b.measures_toy"

Inputs = Mapping[str, Source | tuple[Source, ...]]

NETWORKS = ("fc", "convnet", "resnet18")
PUBLISHED = published(__file__)
CASES = {name: row["case"] for name, row in PUBLISHED["overlaps"].items()}
"""The rows of the paper's table 1, in words."""
PAPER_OVERLAPS = {row["case"]: row["mean"] for row in PUBLISHED["overlaps"].values()}
CHANGES = ("small-lr", "large-batch", "softmax", "softplus", "random-labels", "convnet-adam")
"""The panels of figure 12, in the paper's order."""
LABELS = {name: row["case"] for name, row in PUBLISHED["outliers"].items()}
PAPER_OUTLIERS = {row["case"]: row["count"] for row in PUBLISHED["outliers"].values()}
PANEL_DIMENSIONS = [2, 5, 9, 11, 15, 20]


def declare(config: Mapping[str, Any]) -> Study:
    """B-F1 … B-X2 at the scale of ``studies.b``."""
    b = config["studies"]["b"]
    return Study(
        artefacts=[
            *_networks(b),
            *_eigenvectors(b),
            *_cases(b),
            _variants(b),
            *_spectra(b),
            _edge(b),
            *_toy(b),
            _learning(b),
        ]
    )


def _figure(id: str, function: str, inputs: Inputs, title: str, **rest: Any) -> Artefact:
    return Artefact(id, "figure", function, inputs, paper="B", title=title, **rest)


def _table(id: str, function: str, inputs: Inputs, title: str, **rest: Any) -> Artefact:
    return Artefact(id, "table", f"{TABLES}:{function}", inputs, paper="B", title=title, **rest)


def _run(b: Mapping[str, Any], block: Mapping[str, Any], seed: int | None = None) -> Run:
    chosen = b["seed"] if seed is None else seed
    return Run(block["dataset"], block["model"], block["optimizer"], block["batch_size"], block["lr"], chosen)


def _measured(b: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """On what a run is measured: the keyword arguments that all measures share."""
    return {"examples": block["examples"], "batch": block["microbatch"], "batch_norm": block["batch_norm"]}


def _trajectory(b: Mapping[str, Any], name: str, block: Mapping[str, Any], k: int, seed: int | None = None) -> Measure:
    spec = {**_measured(b, block), "steps": block["steps"], "k": k, "tol": b["tol"]}
    if block.get("starts"):
        spec |= {"starts": block["starts"], "dimensions": b["dimensions"]}
    own = "" if seed in (None, b["seed"]) else f"-seed-{seed}"
    return Measure(f"b/trajectory/{name}{own}", f"{MEASURES}:trajectory", (_run(b, block, seed),), spec=spec)


def _networks(b: Mapping[str, Any]) -> list[Artefact]:
    """What is read from the top eigenpairs along the training of the three networks."""
    measures = {name: _trajectory(b, name, b["networks"][name], b["k"]) for name in NETWORKS}
    fc = {"fc": measures["fc"]}
    two = {name: measures[name] for name in ("fc", "resnet18")}
    bends = {
        name: tuple(_trajectory(b, name, b["networks"][name], b["k"], seed) for seed in b["bend_seeds"]) for name in two
    }
    dimensions = [d for d in PANEL_DIMENSIONS if d in b["dimensions"]]
    sums, order = {"steps": b["gradient_steps"]}, {"order": list(NETWORKS)}
    return [
        _figure(
            "B-F1",
            f"{FIGURES}:f_top_with_training",
            measures,
            "Gradient in the top subspace, early in training",
            spec=order,
        ),
        _figure("B-F2", f"{FIGURES}:subspace_overlaps", measures, "Overlap of top subspaces at two steps", spec=order),
        _figure("B-F3", f"{FIGURES}:overlap_by_dimension", bends, "Mean overlap against the subspace's dimension"),
        _table("B-T4", "kink", bends, "Dimension at which the mean overlap is largest"),
        _figure("B-F8", f"{FIGURES}:largest_eigenvalue", two, "Largest eigenvalue through training"),
        *(
            _figure(
                id,
                f"{FIGURES}:overlaps_of_dimensions",
                {name: measures[name]},
                f"Overlap of top subspaces of several dimensions, {name}",
                spec={"dimensions": dimensions},
            )
            for id, name in (("B-F9", "fc"), ("B-F10", "resnet18"))
        ),
        _figure("B-F11", f"{FIGURES}:gradient_by_eigenvector", fc, "Gradient along each eigenvector", spec=sums),
        _table(
            "B-T3",
            "gradient_sums",
            fc,
            "Gradient in the first 2k eigenvectors",
            spec={**sums, "paper": PUBLISHED["sums"]},
        ),
        _figure(
            "B-X1", f"{FIGURES}:nulls", measures, "Overlaps, chance, and the span of the class gradients", spec=order
        ),
    ]


def _eigenvectors(b: Mapping[str, Any]) -> list[Artefact]:
    block, fc = b["eigenvectors"], b["networks"]["fc"]
    spec = {**_measured(b, fc), "steps": block["steps"], "thin": block["thin"], "tol": b["tol"]}
    entries = Measure("b/eigenvectors", f"{MEASURES}:eigenvectors", (_run(b, fc),), spec=spec)
    return [
        _figure("B-F6", f"{SPECTRA_FIGURES}:eigenvector_entries", {"entries": entries}, "Top eigenvector by layer"),
        _figure("B-F7", f"{SPECTRA_FIGURES}:last_layer_entries", {"entries": entries}, "Top eigenvector, last layer"),
    ]


def _cases(b: Mapping[str, Any]) -> list[Artefact]:
    """Table 1 (overlap of g and Hg late in training) and figure 12 (f_top early)."""
    late, early = {}, {}
    for name, label in CASES.items():
        block = b["cases"][name]
        spec = {**_measured(b, block), "last": b["last"], "splits": ["train", "test"]}
        late[label] = Measure(f"b/overlap/{name}", f"{MEASURES}:overlaps", (_run(b, block),), spec=spec)
    for name in CHANGES:
        block = b["cases"][name]
        followed = {**block, "examples": block.get("early_examples", block["examples"])}
        early[CASES[name]] = _trajectory(b, name, followed, block["k"])
    return [
        _table(
            "B-T1",
            "mean_overlaps",
            late,
            "Mean overlap of gradient and Hessian-gradient product",
            spec={"paper": PAPER_OVERLAPS, "order": list(CASES.values())},
        ),
        _figure(
            "B-F12",
            f"{FIGURES}:f_top_under_changes",
            early,
            "Gradient in the top subspace under six changes",
            spec={"order": [CASES[name] for name in CHANGES]},
        ),
    ]


def _variants(b: Mapping[str, Any]) -> Artefact:
    """Rows of table 1 again with one thing changed at a time: inputs, initialisation, labels, epochs."""
    block = b["variants"]
    spec = {**_measured(b, block), "last": None, "splits": ["train"]}
    measures = {
        name: tuple(
            Measure(f"b/variants/{name}/seed-{s}", f"{MEASURES}:overlaps", (_run(b, {**block, **row}, s),), spec=spec)
            for s in row["seeds"]
        )
        for name, row in block["runs"].items()
    }
    paper = {name: PAPER_OVERLAPS[CASES[row["row"]]] for name, row in block["runs"].items() if row.get("row")}
    return _table(
        "B-T6",
        "overlaps_by_epoch",
        measures,
        "Overlap of gradient and Hessian-gradient product by inputs, initialisation and epochs",
        spec={"paper": paper, "last": b["last"], "order": list(measures)},
    )


def _spectra(b: Mapping[str, Any]) -> list[Artefact]:
    block = b["spectra"]
    keys = ("dense_up_to", "probes", "lanczos_steps")
    measures = {}
    for name, label in LABELS.items():
        run = block["runs"][name]
        spec = {
            **_measured(b, run),
            **{key: block[key] for key in keys},
            "k": block["k"],
            "tol": b["tol"],
        }
        measures[label] = Measure(f"b/spectrum/{name}", f"{SPECTRA}:spectrum", (_run(b, run),), spec=spec)
    order = {"order": list(LABELS.values())}
    return [
        _figure("B-F4", f"{SPECTRA_FIGURES}:spectra", measures, "Hessian spectrum for three labellings", spec=order),
        _table("B-T2", "outliers", measures, "Eigenvalues that stand out", spec={**order, "paper": PAPER_OUTLIERS}),
    ]


def _edge(b: Mapping[str, Any]) -> Artefact:
    block = b["edge"]
    spec = {**_measured(b, block), "k": block["k"], "tol": b["tol"]}
    measures = tuple(
        Measure(f"b/edge/seed-{seed}", f"{SPECTRA}:edge", (_run(b, block, seed),), spec=spec) for seed in block["seeds"]
    )
    return _figure("B-F5", f"{SPECTRA_FIGURES}:right_edge", {"edge": measures}, "Right edge of the Hessian spectrum")


def _toy(b: Mapping[str, Any]) -> list[Artefact]:
    toy = Measure("b/toy", f"{TOY}:toy_model", spec=b["toy"])
    return [
        _figure("B-TOY", f"{TOY_FIGURES}:toy_model", {"toy": toy}, "The toy model beside its exact solution"),
        _table("B-T5", "toy_checks", {"toy": toy}, "The toy model's checks late in training"),
    ]


def _learning(b: Mapping[str, Any]) -> Artefact:
    block = b["learning"]
    runs = tuple(
        Run(block["dataset"], block["model"], optimizer, block["batch_size"], block["lr"], seed)
        for optimizer in block["optimizers"]
        for seed in block["seeds"]
    )
    return _figure("B-X2", f"{FIGURES}:dominant_and_bulk", {"runs": runs}, "Learning in the top subspace, and outside")
