"""Two optimisers at two learning rates, one measure, two figures and a table."""

from papers.common.study import Artefact, Measure, Run, Study


def declare(config):
    mini = config["studies"]["mini"]
    runs = [Run("digits", "small", name, 64, lr, 0) for name in mini["optimizers"] for lr in mini["lrs"]]
    conv = Run("digits", "conv", "sgd", 64, 0.1, 0)
    spectrum = Measure("mini/spectrum", "papers.mini.measures:spectrum", (conv,), spec={"k": 3})
    return Study(
        artefacts=[
            Artefact("M-F1", "figure", "papers.mini.figures:losses", {"runs": tuple(runs)}, paper="M"),
            Artefact("M-F2", "figure", "papers.mini.figures:spectrum", {"measure": (spectrum,)}, paper="M"),
            Artefact("M-T1", "table", "papers.mini.tables:best", {"runs": tuple(runs)}, paper="M"),
        ]
    )
