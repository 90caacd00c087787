"""A measure that leans on one module of the library."""

import pandas as pd
import torch

from curvspace.subspace import gradient_fraction


def spectrum(context, k):
    (run,) = context.runs
    model = context.model(run, run.steps[-1])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    axes = torch.eye(len(weights))[:, :k]
    return pd.DataFrame(
        {"step": range(k), "train_loss": [gradient_fraction(weights, axes[:, : n + 1]) for n in range(k)]}
    )


def unused(context):
    return context
