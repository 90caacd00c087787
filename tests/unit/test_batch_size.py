"""How many examples a batch has: batches of several lengths have their weights by it, or the objective asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from curvspace import Objective, class_gradients
from curvspace.batches import batch_size, layout, number_of_examples, select
from curvspace.inputs import call
from curvspace.losses import get_loss
from curvspace.optim import class_gradient_newton
from curvspace.optim.base import Costs
from curvspace.optim.minibatch import Minibatch
from tests.unit.oracles import trainable
from tests.unit.small_networks import Fn


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _mean(model: nn.Module, batches: list[Any], loss: Callable[..., Tensor], sizes: list[int]) -> Tensor:
    values = (loss(call(model, x), y) * (n / sum(sizes)) for n, (x, y) in zip(sizes, batches, strict=True))
    return torch.stack(list(values)).sum()


def _require_right(
    model: nn.Module, batches: list[Any], loss: Any, sizes: list[int], cut: bool = False, **options: Any
) -> None:
    """Loss, gradient and a product with the Hessian, by the model and central differences, also cut."""
    parameters = trainable(model)
    vector = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(3)).double()

    def gradient(step: float = 0.0) -> Tensor:
        moved = [step * v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters)]  # noqa: B905
        with torch.no_grad():
            torch._foreach_add_(parameters, moved)
        found = torch.autograd.grad(_mean(model, batches, loss, sizes), parameters)
        with torch.no_grad():
            torch._foreach_sub_(parameters, moved)
        return torch.cat([g.reshape(-1) for g in found])

    product = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    for microbatch in (None, 1, 2):
        objective = Objective(model, batches, loss, microbatch=microbatch, **options)
        if microbatch is not None and not cut:
            with pytest.raises(ValueError, match="would change the function"):
                objective.loss()
            continue
        assert objective.loss() == pytest.approx(_mean(model, batches, loss, sizes).item())
        torch.testing.assert_close(objective.gradient(), gradient())
        torch.testing.assert_close(objective.hessian() @ vector, product, rtol=1e-6, atol=1e-7)


def _data(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def _boxes(counts: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(sum(counts))
    return [{"boxes": torch.randn(k, 3, generator=generator).double(), "labels": torch.zeros(k)} for k in counts]


def _images(counts: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(counts))
    return [torch.randn(4, k, generator=generator).double() for k in counts]


def _of_boxes(z: Any, targets: list[dict[str, Tensor]]) -> Tensor:
    assert len(z) == len(targets)
    squares = [(a - t["boxes"]).square().sum() for a, t in zip(z, targets, strict=True)]
    return torch.stack(squares).sum() / len(targets)


def _of_ragged(z: Tensor, targets: list[Tensor]) -> Tensor:
    assert len(z) == len(targets)
    return torch.stack([(a - t).square().sum() for a, t in zip(z, targets, strict=True)]).sum() / len(targets)


def _detector() -> nn.Module:
    return Fn(lambda m, images: [m.head(image.mean(1)) for image in images], head=_mlp())


@pytest.mark.parametrize("batched", [None, ()], ids=["found", "none"])
@pytest.mark.parametrize("first", [[1, 2, 3, 2, 1], [5, 1, 2, 2, 1], [4, 1, 2, 2, 1], [4, 4, 4, 4, 4]], ids=str)
def test_one_mapping_an_example(first: list[int], batched: Any) -> None:
    torch.manual_seed(0)
    there = [_boxes(first), _boxes([3, 2, 3])]
    x = _data(5)[0], _data(3)[0]
    _require_right(_mlp(), list(zip(x, there, strict=True)), _of_boxes, [5, 3], batched=batched)
    images = [((_images([1, 2, 3, 2, 1]),), there[0]), ((_images([2, 3, 3]),), there[1])]
    _require_right(_detector(), images, _of_boxes, [5, 3], batched=batched)


@pytest.mark.parametrize("batched", [None, ()], ids=["found", "none"])
@pytest.mark.parametrize("first", [[1, 2, 3, 2, 1], [5, 1, 2, 2, 1]], ids=str)
def test_a_list_of_targets_of_several_lengths(first: list[int], batched: Any) -> None:
    torch.manual_seed(0)
    there = [[t["boxes"] for t in _boxes(counts)] for counts in (first, [3, 2, 3])]
    x = _data(5)[0], _data(3)[0]
    _require_right(_mlp(), list(zip(x, there, strict=True)), _of_ragged, [5, 3], batched=batched)


def test_a_list_of_single_numbers() -> None:
    torch.manual_seed(0)
    x = [_data(n)[0] for n in (5, 3)]
    loss = lambda z, y: F.cross_entropy(z, torch.stack(list(y)))  # noqa: E731
    _require_right(_mlp(), [(v, list(_data(len(v))[1].unbind())) for v in x], loss, [5, 3])
    loss = lambda z, y: F.cross_entropy(z, torch.tensor(y))  # noqa: E731
    _require_right(_mlp(), [(v, _data(len(v))[1].tolist()) for v in x], loss, [5, 3])


def _weighted(z: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(z, y[1], y[0], reduction="none").mean()


def test_a_tensor_that_all_examples_share_before_them() -> None:
    torch.manual_seed(0)
    model = Fn(lambda m, a, x: m.head(x @ a), head=_mlp())
    a, w = torch.rand(4, 4).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    batches = [((a, x), (w, y)) for x, y in map(_data, (20, 6))]
    _require_right(model, batches, _weighted, [20, 6], cut=True)
    a3 = torch.rand(3, 4).double()
    model = Fn(lambda m, a, x: m.head(x * a.sum(0)), head=_mlp())
    batches = [((a3, x), (w, y)) for x, y in map(_data, (20, 6))]
    with pytest.raises(ValueError, match="batch 0: its number of examples may be 3 or 20"):
        Objective(model, batches, _weighted)
    _require_right(model, batches, _weighted, [20, 6], cut=True, batched=[1])
    _require_right(model, batches[:1], _weighted, [20])


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 5, batch_first=batch_first), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def _sequences(n: int, steps: int, targets: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, steps, 4, generator=generator).double()
    labels = torch.randint(3, (n, steps), generator=generator)
    return x, labels if targets == "labels" else torch.randn(n, steps, 3, generator=generator).double()


def _over_steps(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def test_time_along_the_first_dimension() -> None:
    torch.manual_seed(0)
    first = [_sequences(n, 6, "labels") for n in (9, 5)]
    turned = [(x.transpose(0, 1), y.transpose(0, 1)) for x, y in first]
    _require_right(Recurrent(True), first, _over_steps, [9, 5], cut=True)
    with pytest.raises(ValueError, match="batch 1 seems to have 5 examples along the second dimension and 6 steps"):
        Objective(Recurrent(False), turned, _over_steps)
    model = Recurrent(False)
    _require_right(model, [turned[0], turned[0]], _over_steps, [1, 1])  # whichever it is, they count alike
    longer = [_sequences(4, n, "labels") for n in (6, 9)]
    _require_right(Recurrent(True), longer, _over_steps, [4, 4], cut=True)


def test_half_the_squared_distance_of_an_example_with_time_first() -> None:
    torch.manual_seed(0)
    x, y = _sequences(5, 6, "values")
    one = lambda z, y: 0.5 * (z - y).square().sum() / len(y)  # noqa: E731
    assert Objective(Recurrent(True), (x, y), "mse").loss() > 0
    with pytest.raises(ValueError, match="seems to have 5 examples along the second dimension"):
        Objective(Recurrent(False), (x.transpose(0, 1), y.transpose(0, 1)), "mse")
    model = Recurrent(False)
    turned = [(x.transpose(0, 1), y.transpose(0, 1))]
    assert Objective(model, turned, "mse", batched=[0]).loss() == pytest.approx(_mean(model, turned, one, [1]).item())
    assert Objective(model, turned, "mse_loss").loss() == pytest.approx(_mean(model, turned, F.mse_loss, [1]).item())


class LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Any) -> Tensor:
        return self.head(self.rnn(x)[1][-1])


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(enforce_sorted: bool) -> None:
    torch.manual_seed(0)
    lengths = [[4, 3, 2, 1], [5, 4, 3, 2, 1], [9, 2]]
    packs = [pack_sequence([torch.randn(k, 4).double() for k in ks], enforce_sorted=enforce_sorted) for ks in lengths]
    batches = [(p, torch.randint(3, (len(ks),))) for p, ks in zip(packs, lengths, strict=True)]
    _require_right(LastStep(), batches, F.cross_entropy, [4, 5, 2])
    steps = Fn(lambda m, x: m.head(m.rnn(x)[0].data), **dict(LastStep().named_children()))
    own = [(p, pack_sequence([torch.randint(3, (k,)) for k in ks])) for p, ks in zip(packs, lengths, strict=True)]
    _require_right(steps, own, lambda z, y: F.cross_entropy(z, y.data), [10, 15, 11])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_layers_on_jagged_tensors() -> None:
    """What autograd keeps of them has no memory of its own."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h, row = m.first(x).tanh(), torch.arange(len(x)).repeat_interleave(x.offsets().diff())
        return m.head(torch.zeros(len(x), 5).double().index_add(0, row, h.values()))

    torch.manual_seed(0)
    model = Fn(forward, first=nn.Linear(4, 5), head=nn.Linear(5, 3)).double()
    parts = [[torch.randn(k, 4).double() for k in lengths] for lengths in ([2, 3, 4, 2], [1, 5])]
    batches = [(torch.nested.nested_tensor(p, layout=torch.jagged), torch.randint(3, (len(p),))) for p in parts]
    _require_right(model, batches, F.cross_entropy, [4, 2])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", ["strided", "jagged", "sparse"])
def test_inputs_that_are_not_cut(kind: str) -> None:
    torch.manual_seed(0)
    model = Fn(lambda m, x: torch.stack([m.head(t).mean(0) for t in x.unbind()]), head=_mlp())

    def inputs(lengths: list[int]) -> Tensor:
        parts = [torch.randn(k, 4).double() for k in lengths]
        return torch.nested.nested_tensor(parts, layout=torch.jagged if kind == "jagged" else torch.strided)

    batches = [(inputs(lengths), torch.randint(3, (len(lengths),))) for lengths in ([2, 3, 4, 2], [1, 5])]
    if kind == "sparse":
        model = Fn(lambda m, x: m.head(x.to_dense()), head=_mlp())
        batches = [(x.to_sparse(), y) for x, y in map(_data, (4, 2))]
    _require_right(model, batches, F.cross_entropy, [4, 2])
    with pytest.raises(ValueError, match="would change the function"):
        Objective(model, batches, microbatch=1).loss()


def test_a_part_of_what_is_not_cut_is_refused() -> None:
    targets = _boxes([1, 2, 3])
    assert batch_size(targets) == 3
    assert layout(0, _data(3)[0], targets, None)[0] == 3
    with pytest.raises(ValueError, match="a part cannot be taken"):
        select((_data(3)[0], targets), slice(0, 2), size=3)


def test_a_fraction_of_a_batch_with_batch_normalisation_and_an_interaction() -> None:
    torch.manual_seed(0)
    model = Fn(lambda m, x: m.head(m.bn(x - x.mean(0))), bn=nn.BatchNorm1d(4), head=nn.Linear(4, 3))
    x, y = _data(40)
    optimizer = class_gradient_newton(model, num_classes=3, fraction=0.5, estimate="hessian")
    with pytest.raises(ValueError, match="use fraction=1"):
        optimizer.step(x.float(), y)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    class_gradient_newton(model, num_classes=3, fraction=0.5, estimate="hessian").step(x.float(), y)


def test_a_part_of_a_minibatch_whose_targets_begin_with_a_shared_tensor() -> None:
    (x, y), w = _data(20), torch.ones(3).double()
    assert number_of_examples(x, (w, y)) == 20
    batch = Minibatch(_mlp(), get_loss(_weighted), x, (w, y), Costs()).part(0.25)
    assert len(batch.inputs) == len(batch.targets[1]) == 5
    assert batch.targets[0] is w


def test_class_gradients_and_fractions_of_lists() -> None:
    torch.manual_seed(0)
    model = Fn(lambda m, images: torch.stack([m.head(image.mean(1)) for image in images]), head=_mlp().float())
    images, y = ([image.float() for image in _images([1 + i % 3 for i in range(12)])],), torch.arange(12) % 3
    c, _ = class_gradients(model, images, y, 3)
    for k in range(3):
        own = torch.autograd.grad(model(*images)[y == k, k].mean(), trainable(model))
        torch.testing.assert_close(c[k], torch.cat([g.flatten() for g in own]))
    with pytest.raises(ValueError, match="of a batch cannot be taken: no input is a tensor"):
        class_gradient_newton(model, num_classes=3, fraction=0.5, estimate="hessian").step(images, y)
    with pytest.raises(ValueError, match="need integer targets of shape"):
        class_gradient_newton(model, num_classes=3).step(images, _boxes([1] * 12))
