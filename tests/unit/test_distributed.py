"""Two processes, each with its shard of the data, against one process with all of it."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp

from curvspace import Objective, eigsh
from tests.unit.small_networks import minibatch, mlp


def _worker(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model, (x, y) = mlp(), minibatch(11)
    shard = slice(0, 7) if rank == 0 else slice(7, 11)
    objective = Objective(model, [(x[shard], y[shard])], group=torch.distributed.group.WORLD)
    alone = Objective(model, [(x[shard], y[shard])])  # joins no group unasked
    if rank == 0:
        alone.loss()  # waits for nobody
    results = {
        "loss": objective.loss(),
        "gradient": objective.gradient(),
        "identity": objective.hessian() @ torch.eye(objective.num_parameters).double(),
        "pairs": eigsh(objective.gauss_newton(), 3, tol=1e-8).vectors,
        "examples": (objective.num_examples, alone.num_examples),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_shards_on_two_ranks_are_one_objective(tmp_path):
    mp.spawn(_worker, args=(f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    model, (x, y) = mlp(), minibatch(11)
    objective = Objective(model, [(x, y)])
    expected = objective.hessian() @ torch.eye(objective.num_parameters).double()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [r["examples"] for r in ranks] == [(11, 7), (11, 4)]
    for found in ranks:
        assert abs(found["loss"] - objective.loss()) < 1e-14
        torch.testing.assert_close(found["gradient"], objective.gradient(), rtol=0, atol=1e-14)
        torch.testing.assert_close(found["identity"], expected, rtol=0, atol=1e-14)
    assert torch.equal(ranks[0]["pairs"], ranks[1]["pairs"])
