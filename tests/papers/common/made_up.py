"""Tables as measures write them, made up."""

from __future__ import annotations

import pandas as pd


def runs(values: dict[str, list[float]], column: str = "val_loss", **constants: object) -> pd.DataFrame:
    """One row a seed for each optimiser."""
    rows = [
        {"optimizer": name, "seed": seed, "step": 10, column: value, **constants}
        for name, results in values.items()
        for seed, value in enumerate(results)
    ]
    return pd.DataFrame(rows)
