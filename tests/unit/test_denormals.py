"""Denormal numbers are zero inside the package's work, in every thread, and as the user wants them outside."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from curvspace import Objective, class_gradients, eigsh
from curvspace.denormals import flushed, is_flushing
from curvspace.optim import FirstOrder

TWO_THREADS = """
import torch
from curvspace.denormals import flushed

torch.set_num_threads(2)
tiny = torch.full((4_000_000,), 1e-40)

def left():
    bits = (tiny * 1.0).view(torch.int32)  # compared as integers: a flushing thread takes them for zero
    return [int((part != 0).sum()) for part in bits.chunk(2)]

half = len(tiny) // 2
assert left() == [half, half], left()  # the pool has started
for setting in (False, True):
    torch.set_flush_denormal(setting)  # the user's, of the main thread
    before = left()
    with flushed():
        assert left() == [0, 0], left()
        with flushed():
            pass
        assert left() == [0, 0], left()
    assert left() == before, (before, left())
print("done")
"""


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such mode")
def test_every_thread_of_a_pool_that_has_started():
    run = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr


@pytest.fixture(params=[False, True])
def setting(request):
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def test_the_users_setting_comes_back(setting):
    assert is_flushing() is setting
    with flushed():
        assert is_flushing()
        with flushed():
            assert is_flushing()
        assert is_flushing()
    assert is_flushing() is setting
    with pytest.raises(KeyError), flushed():
        raise KeyError
    assert is_flushing() is setting


def test_products_eigenpairs_gradients_and_steps_flush(setting):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(is_flushing())
            return super().forward(x)

    torch.manual_seed(0)
    model, x, y = Spy(4, 3), torch.randn(9, 4), torch.randint(3, (9,))
    objective = Objective(model, [(x, y)])
    H = Objective(model, [(x, y)], engine="recompute").hessian()
    work = {
        "loss": objective.loss,
        "gradient": objective.gradient,
        "product": lambda: H @ torch.ones(H.shape[0]),
        "eigenpairs": lambda: eigsh(H, 1),
        "class gradients": lambda: class_gradients(model, x, y, 3),
        "step": lambda: FirstOrder(model, torch.optim.SGD, lr=0.1).step(x, y),
    }
    for name, call in work.items():
        seen.clear()
        call()
        assert seen, name
        assert all(seen), name
        assert is_flushing() is setting, name
