"""Two optimisers at two learning rates, one measure, two figures and a table."""

from papers.common.study import Artefact, Measure, Run, Study


def declare(config):
    mini = config["studies"]["mini"]
    runs = [Run("digits", "small", name, 64, lr, 0) for name in mini["optimizers"] for lr in mini["lrs"]]
    conv = Run("digits", "conv", "sgd", 64, 0.1, 0)
    spectrum = Measure("mini/spectrum", "curvspace.experiments.mini:spectrum", (conv,), spec={"k": 3})
    return Study(
        artefacts=[
            Artefact("M-F1", "figure", "curvspace.figures.mini:losses", {"runs": tuple(runs)}, paper="M"),
            Artefact("M-F2", "figure", "curvspace.figures.mini:spectrum", {"measure": (spectrum,)}, paper="M"),
            Artefact("M-T1", "table", "curvspace.experiments.tables_mini:best", {"runs": tuple(runs)}, paper="M"),
        ]
    )
