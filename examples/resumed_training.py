"""Training outside the sharp directions, cosine schedule, stopped and resumed bit for bit (--quick: 20 steps)."""

import sys
import tempfile

import torch
from sklearn.datasets import load_digits

from curvspace.optim import bulk_sgd

STEPS = 20 if "--quick" in sys.argv else 400
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def train(stop: int, resume: dict | None = None) -> dict:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = bulk_sgd(model, k=10, lr=0.5, momentum=0.9, span="class-gradients")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for name in parts if resume else ():
        parts[name].load_state_dict(resume[name])
    for step in range(resume["step"] if resume else 0, stop):
        # a function of the step: no generator's state to save
        batch = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        loss = optimizer.step(x[batch], y[batch])
        schedule.step()
    print(f"step {stop}: loss {float(loss):.4f}, learning rate {schedule.get_last_lr()[0]:.4f}")
    return {"step": stop, **{name: part.state_dict() for name, part in parts.items()}}


with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    torch.save(train(STEPS // 2), file.name)
    resumed, straight = train(STEPS, torch.load(file.name, weights_only=True)), train(STEPS)
assert all(torch.equal(resumed["model"][name], value) for name, value in straight["model"].items())
print("resumed and straight trainings end in the same parameters, bit for bit")
