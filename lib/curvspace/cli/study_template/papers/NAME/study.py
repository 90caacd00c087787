"""What the study asks for: training runs, and the figure drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from papers.common.study import Artefact, Run, Study


def declare(config: Mapping[str, Any]) -> Study:
    """All runs by optimiser, learning rate and seed, and one figure of them."""
    block = config["studies"]["NAME"]
    runs = tuple(
        Run("spirals", "network", optimizer, block["batch_size"], lr, seed)
        for optimizer in block["optimizers"]
        for lr in block["lrs"]
        for seed in block["seeds"]
    )
    curves = Artefact("NAME-F1", "figure", "papers.NAME.figures:curves", {"runs": runs}, title="Loss by optimiser")
    return Study(artefacts=[curves])
