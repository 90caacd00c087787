"""Two processes with uneven shards, for every optimiser: equal replicas, and equal to one process with all examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from curvspace import optim
from curvspace.functional import parameter_vector
from curvspace.optim.base import ModelOptimizer
from curvspace.optim.kfac import KFAC

C, STEPS = 3, 4
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double(), label_smoothing=0.1)
SUM = nn.CrossEntropyLoss(reduction="sum")
SHARDS = (slice(0, 11), slice(11, 16))
MAKE: dict[str, Callable[[nn.Module], ModelOptimizer]] = {
    "sgd": lambda m: optim.FirstOrder(m, torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": lambda m: optim.FirstOrder(m, torch.optim.Adam, lr=0.01),
    "paper A": lambda m: optim.class_gradient_newton(m, C, damping=1.0),
    "paper A, sums": lambda m: optim.class_gradient_newton(m, C, damping=5.0, reduction="batch-sum", algorithm="vjp"),
    "Rayleigh-Ritz": lambda m: optim.rayleigh_ritz_newton(m, C, refresh_every=2, fraction=1.0),
    "adaptive": lambda m: optim.SubspaceNewton(
        m,
        optim.ClassGradients(orthonormal=True),
        optim.RayleighRitzNewton(optim.AdaptiveDamping(every=2), fraction=1.0),
        optim.Adam(0.01),
    ),
    "Hessian in the span": lambda m: optim.rayleigh_ritz_newton(m, C, curvature="hessian", fraction=1.0, damping=5.0),
    "low rank": lambda m: optim.low_rank_newton(m, C, refresh_every=2, damping=0.5, max_products=30),
    "bulk": lambda m: optim.bulk_sgd(m, C, momentum=0.9, refresh_every=2, curvature="gauss-newton"),
    "random": lambda m: optim.SubspaceNewton(m, optim.RandomDirections(3), optim.Scale(0.3), optim.Drop(0.1)),
    "sgd, weighted": lambda m: optim.FirstOrder(m, torch.optim.SGD, WEIGHTED, lr=0.1),
    "Rayleigh-Ritz, weighted": lambda m: optim.rayleigh_ritz_newton(m, C, fraction=1.0, loss=WEIGHTED),
    "CurveBall, weighted": lambda m: optim.CurveBall(m, WEIGHTED, damping_interval=2),
    "negative curvature, weighted": lambda m: optim.NegativeCurvature(m, torch.optim.SGD, lr=0.1, loss=WEIGHTED),
    "CurveBall, sum": lambda m: optim.CurveBall(m, SUM, damping_interval=2),
    "paper A, sum": lambda m: optim.class_gradient_newton(m, C, lr=0.01, damping=20.0, loss=SUM),
    "FOSI": lambda m: optim.fosi(m, 2, smallest=1, refresh_every=2, warmup=1, max_products=30, tol=1e-6),
    "past updates": lambda m: optim.bsfa(m, 1, window=2, refresh_every=1),
    "span filter": lambda m: optim.SpanFilter(
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        m,
        C,
        spans=("mean-directions", "class-gradients", "past-updates"),
        gain=0.2,
        beta=0.5,
        refresh_every=2,
        fraction=1.0,
        past_updates=1,
    ),
    "LBFGS": lambda m: optim.FirstOrder(m, torch.optim.LBFGS, lr=0.1, max_iter=3),
    "CurveBall": lambda m: optim.CurveBall(m, damping_interval=2, weight_decay=0.01),
    "CurveBall, fixed rates": lambda m: optim.CurveBall(m, rho=0.9, beta=0.1, adapt_damping=False),
    "negative curvature": lambda m: optim.NegativeCurvature(m, torch.optim.SGD, lr=0.1, lr_v=0.5),
    "Levenberg-Marquardt": lambda m: optim.LevenbergMarquardt(m, "cross_entropy"),
}
FRACTION = {"a share": lambda m: optim.rayleigh_ritz_newton(m, C, refresh_every=1, fraction=0.3)}
NORMALISED = (
    "sgd",
    "paper A",
    "Rayleigh-Ritz",
    "low rank",
    "span filter",
    "CurveBall",
    "negative curvature",
    "Levenberg-Marquardt",
)


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh(), nn.Linear(6, C)]
    return nn.Sequential(*layers).double()


def minibatches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(16, 4, generator=generator).double(), torch.randint(C, (16,), generator=generator)


def _train(model: nn.Module, make: Callable[[nn.Module], ModelOptimizer], shard: slice) -> dict[str, object]:
    optimizer = make(model)
    losses = [float(optimizer.step(x[shard], y[shard])) for x, y in minibatches()]
    buffers = {name: b.clone() for name, b in optimizer.model.named_buffers()}
    log = {name: float(value) for name, value in optimizer.log().items()}
    return {"losses": losses, "theta": parameter_vector(optimizer.model), "buffers": buffers, "log": log}


def _refusals(model: nn.Module) -> list[str]:
    found = []
    ddp = nn.parallel.DistributedDataParallel(model)
    mixed = nn.parallel.DistributedDataParallel(network())
    mixed.module[1] = nn.SyncBatchNorm(6).double()
    for attempt in (
        lambda: KFAC(ddp),
        lambda: optim.CurveBall(mixed),
        lambda: copy.deepcopy(optim.CurveBall(ddp)),
        lambda: optim.CurveBall(ddp).step(torch.randn(2 - 2 * torch.distributed.get_rank(), 4).double(), _few()),
    ):
        try:
            attempt()
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def _few() -> Tensor:
    return torch.zeros(2 - 2 * torch.distributed.get_rank(), dtype=torch.long)


def _worker(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    wrapped = nn.parallel.DistributedDataParallel
    results = {name: _train(wrapped(network()), make, SHARDS[rank]) for name, make in {**MAKE, **FRACTION}.items()}
    normed = {name: _train(wrapped(network(norm=True)), MAKE[name], SHARDS[rank]) for name in NORMALISED}
    torch.save({"plain": results, "norm": normed, "refusals": _refusals(network())}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, args=(f"file://{folder}/rendezvous", str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", [*MAKE, *FRACTION])
def test_replicas_are_equal_bit_for_bit(ranks: list[dict], name: str) -> None:
    first, second = (r["plain"][name] for r in ranks)
    assert torch.equal(first["theta"], second["theta"])
    assert first["losses"] == second["losses"]
    assert str(first["log"]) == str(second["log"])  # NaN before the first check included


@pytest.mark.parametrize("name", NORMALISED)
def test_replicas_with_batch_statistics_are_equal_bit_for_bit(ranks: list[dict], name: str) -> None:
    first, second = (r["norm"][name] for r in ranks)
    assert torch.equal(first["theta"], second["theta"])
    assert first["buffers"].keys() == second["buffers"].keys()
    assert all(torch.equal(value, second["buffers"][key]) for key, value in first["buffers"].items())


@pytest.mark.parametrize("name", MAKE)
def test_two_processes_do_what_one_does_with_all_examples(ranks: list[dict], name: str) -> None:
    alone = _train(network(), MAKE[name], slice(None))
    found = ranks[0]["plain"][name]
    torch.testing.assert_close(found["theta"], alone["theta"], rtol=0, atol=1e-8)
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-9)
    assert found["log"] == pytest.approx(alone["log"], abs=1e-6, nan_ok=True)


def test_what_cannot_be_shared_is_refused_in_every_process(ranks: list[dict]) -> None:
    for found in (r["refusals"] for r in ranks):
        assert [message.split(";")[0] for message in found] == [
            "KFAC works within one process",
            "CurveBall cannot differentiate SyncBatchNorm as it needs",
            "CurveBall of a distributed model cannot be copied",
            "rank 1 has no example in its shard of the minibatch",
        ]
