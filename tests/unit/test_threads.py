"""Several threads ask at once: of one model, or each of its own under switches that all threads share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.landscape import LossScanner

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(20) % 3


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def _at_once(works: list[Callable[[], None]], times: int = 6) -> None:
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            for _ in range(times):
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _values(objective: Objective) -> list[torch.Tensor]:
    v = torch.ones(objective.num_parameters).double()
    return [
        torch.tensor([objective.loss(), *LossScanner(objective).along(v, [0.1])]),
        objective.gradient(),
        objective.hessian() @ v,
        objective.gauss_newton() @ v,
        class_gradients(objective.model, X, Y, 3)[0],
    ]


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
@pytest.mark.parametrize("dropout_seed", [None, 3])
def test_threads_that_ask_at_once(shared, dropout_seed):
    models = [_mlp()] * 3 if shared else [_mlp() for _ in range(3)]
    objectives = [Objective(model, [(X, Y)], dropout_seed=dropout_seed) for model in models]
    expected, parameters = _values(objectives[0]), [list(model.parameters()) for model in models]

    def work(objective: Objective) -> None:
        for found, value in zip(_values(objective), expected, strict=True):
            torch.testing.assert_close(found, value)

    switches = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    _at_once([lambda o=o: work(o) for o in objectives])
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == switches
    for model, before in zip(models, parameters, strict=True):
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
        assert model.training


def test_objectives_made_at_once_take_the_models_own_mode():
    model = _mlp()
    model[1] = nn.BatchNorm1d(5).double()
    expected = Objective(model, [(X, Y)]).policy, Objective(model, [(X, Y)]).loss()

    def work() -> None:
        objective = Objective(model, [(X, Y)])
        assert (objective.policy, objective.loss()) == expected

    _at_once([work] * 3)
