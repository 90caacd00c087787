"""The losses' closed forms: value, gradient and Hessian product against torch's function and autograd of it."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective
from curvspace.curvature import projected_gauss_newton
from curvspace.functional import flatten
from curvspace.losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError, SquaredError, TorchLoss, get_loss
from curvspace.outputs import logits, pack
from tests.unit.oracles import central_difference
from tests.unit.small_networks import minibatch, mlp

W = torch.tensor([0.1, 2.0, 5.0], dtype=torch.float64)


def _labels(*shape: int, ignore: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
    y = torch.randint(3, shape, generator=torch.Generator().manual_seed(2))
    if ignore is not None:
        y.reshape(-1)[::3] = ignore
    return y.to(dtype)


def _soft(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).double().softmax(1)


def _half_squared_distance(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum() / len(z)


cross_entropy, bce = F.cross_entropy, F.binary_cross_entropy_with_logits
REALS = torch.randn(5, 3, generator=torch.Generator().manual_seed(4)).double()
CASES = {  # ours, torch's own, targets
    "index": ("cross_entropy", cross_entropy, _labels(5)),
    "positions": ("cross_entropy", cross_entropy, _labels(5, 2, 4)),
    "uint8": ("cross_entropy", lambda z, y: cross_entropy(z, y.long()), _labels(5, dtype=torch.uint8)),
    "int32": ("cross_entropy", lambda z, y: cross_entropy(z, y.long()), _labels(5, 2, dtype=torch.int32)),
    "soft": ("cross_entropy", cross_entropy, _soft(5, 3)),
    "soft positions": ("cross_entropy", cross_entropy, _soft(5, 3, 2)),
    "ignored": ("cross_entropy", cross_entropy, _labels(5, 2, ignore=-100)),
    "ignored uint8": (
        CrossEntropy(ignore_index=255),
        lambda z, y: cross_entropy(z, y.long(), ignore_index=255),
        _labels(5, 2, ignore=255, dtype=torch.uint8),
    ),
}
for _name, _targets in {"index": _labels(5), "ignored": _labels(5, 2, ignore=-100), "soft": _soft(5, 3, 2)}.items():
    for _options in (
        {"weight": W},
        {"label_smoothing": 0.2},
        {"weight": W, "label_smoothing": 0.2},
        {"reduction": "sum"},
    ):
        _module = nn.CrossEntropyLoss(**_options)
        CASES[f"{_name} {' '.join(_options)}"] = (_module, _module.forward, _targets)
_BCE = nn.BCEWithLogitsLoss(weight=W, pos_weight=W.flip(0))
CASES |= {
    "nll": ("nll_loss", F.nll_loss, _labels(5)),
    "nll ignored weight": (nn.NLLLoss(W), functools.partial(F.nll_loss, weight=W), _labels(5, 2, ignore=-100)),
    "bce": ("binary_cross_entropy_with_logits", bce, REALS.sigmoid()),
    "bce weights": (_BCE, _BCE.forward, REALS.sigmoid()),
    "bce sum": (BinaryCrossEntropy(reduction="sum"), functools.partial(bce, reduction="sum"), REALS.sigmoid()),
    "mse": ("mse", _half_squared_distance, REALS),
    "mse_loss": ("mse_loss", F.mse_loss, REALS),
    "mse module": (nn.MSELoss(), F.mse_loss, REALS),
    "callable": (lambda z, y: (z.square().sum(1) ** 1.5).mean(), lambda z, y: (z.square().sum(1) ** 1.5).mean(), REALS),
    "linear": (lambda z, y: z.sum(1).mean(), lambda z, y: z.sum(1).mean(), REALS),
}


@pytest.mark.parametrize(("ours", "theirs", "targets"), CASES.values(), ids=CASES.keys())
def test_value_gradient_and_hessian_product(ours, theirs, targets):
    loss = get_loss(ours)
    shape = targets.shape if targets.is_floating_point() else (5, 3, *targets.shape[1:])
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    u = torch.randn(shape, generator=generator, dtype=torch.float64)
    value = theirs(z, targets)
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    product = torch.zeros_like(u)
    if gradient.requires_grad:
        (product,) = torch.autograd.grad(gradient, z, u, materialize_grads=True)
    torch.testing.assert_close(loss(z, targets), value, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss.gradient(z.detach(), targets), gradient.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(loss.hessian_product(z.detach(), targets, u), product, rtol=0, atol=1e-10)
    if loss.closed_form:  # parts are put together by their weights
        parts = [(loss(z[p], targets[p]), loss.weight(targets[p])) for p in (slice(0, 2), slice(2, 5))]
        total = sum(w for _, w in parts) if loss.reduction == "mean" else 1.0
        torch.testing.assert_close(sum(v * w for v, w in parts if w) / total, value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.linspace(0.5, 1, 200).double()}])
def test_labels_of_a_short_type_are_not_taken_for_ignored_ones(options: dict, dtype: torch.dtype) -> None:
    """156 is -100 modulo 256: gradient and products against autograd of torch's own loss with int64 labels."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 200, generator=generator, dtype=torch.float64, requires_grad=True)
    u = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    y = torch.tensor([156, 3, 199, 156])
    loss = CrossEntropy(**options)
    (gradient,) = torch.autograd.grad(F.cross_entropy(z, y, **options), z, create_graph=True)
    (product,) = torch.autograd.grad(gradient, z, u)
    torch.testing.assert_close(loss(z, y.to(dtype)), F.cross_entropy(z, y, **options))
    torch.testing.assert_close(loss.gradient(z.detach(), y.to(dtype)), gradient.detach())
    torch.testing.assert_close(loss.hessian_product(z.detach(), y.to(dtype), u), product)


def test_one_example_without_a_batch_dimension():
    z, y = torch.randn(3).double(), torch.tensor(1)
    expected = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), z)
    found = torch.stack([CrossEntropy().hessian_product(z, y, u) for u in torch.eye(3).double()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("weight", "label"), [(None, -100), (W, -100), (torch.tensor([0.0, 2.0, 5.0]).double(), 0)], ids=str
)
def test_derivatives_are_zero_where_no_target_counts(weight, label, smoothing, positions):
    """torch's own gradient of ignored targets is 0 although the mean is NaN."""
    y = torch.full((5, *positions), label)
    z = torch.randn(5, 3, *positions).double().requires_grad_()
    for module in (nn.CrossEntropyLoss(weight, label_smoothing=smoothing), nn.NLLLoss(weight)):
        loss = get_loss(module)
        value = loss(z, y)
        assert value.isnan()
        for found in (loss.gradient(z.detach(), y), loss.hessian_product(z.detach(), y, torch.randn_like(z))):
            assert not found.any()
        if label == -100:
            assert not torch.autograd.grad(module(z, y), z)[0].any()


def test_normalisations_of_the_squared_error():
    z, y = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert float(SquaredError()(z, y)) == 0.5 * 5 / 2
    assert float(MeanSquaredError()(z, y)) == 5 / 4


def test_names_callables_and_what_is_recognised():
    assert isinstance(get_loss("cross_entropy"), CrossEntropy)
    assert isinstance(get_loss("mse"), SquaredError)
    loss = CrossEntropy()
    assert get_loss(loss) is loss
    smooth = get_loss(functools.partial(F.cross_entropy, label_smoothing=0.1))
    assert isinstance(smooth, CrossEntropy)
    assert smooth.label_smoothing == 0.1
    assert type(get_loss(F.l1_loss)) is TorchLoss
    assert type(get_loss(functools.partial(F.cross_entropy, size_average=False))) is Loss

    class Focal(nn.CrossEntropyLoss):
        def forward(self, z, y):
            return super().forward(z, y) ** 2

    assert type(get_loss(Focal())) is Loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_loss("hinge"), "unknown loss 'hinge'"),
        (lambda: get_loss(3), "a loss is a name or a callable"),
        (lambda: CrossEntropy(1.5), r"label_smoothing must be in \[0, 1\), got 1.5"),
        (lambda: get_loss(nn.CrossEntropyLoss(reduction="none")), 'reduction must be "mean" or "sum"'),
        (lambda: get_loss("mse")(torch.zeros(3, 1), torch.zeros(3)), r"mse needs targets of shape \(3, 1\)"),
        (lambda: logits((torch.zeros(1), torch.zeros(1))), "outputs are a tuple without one tensor or .logits"),
    ],
)
def test_wrong_losses_targets_and_outputs_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nll_says_that_gauss_newton_is_zero_by_definition():
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()
    x, y = torch.randn(6, 4).double(), _labels(6)
    with pytest.warns(RuntimeWarning, match="its Gauss-Newton matrix is 0 by definition"):
        G = Objective(model, (x, y), nn.NLLLoss()).gauss_newton()
    assert not (G @ torch.ones(15).double()).any()
    H = Objective(model, (x, y), "nll_loss").hessian()
    expected = Objective(model[0], (x, y)).hessian()
    v = torch.randn(15).double()
    torch.testing.assert_close(H @ v, expected @ v, rtol=0, atol=1e-14)


LINEAR = {
    "lambda": (lambda z, y: F.nll_loss(z, y), _labels(6)),
    "of a part": (lambda z, y: -z[:, 0].mean(), _labels(6)),
    "absolute values": (nn.L1Loss(), _soft(6, 3)),
    "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), _soft(6, 3)),
    "partial": (functools.partial(F.kl_div, reduction="sum"), _soft(6, 3)),
}


@pytest.mark.parametrize(("loss", "targets"), LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize("engine", ["linearize", "recompute"])
def test_other_linear_losses_say_so_at_their_first_product(loss, targets, engine):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double(), torch.randn(6, 4).double()
    G = Objective(model, (x, targets), loss, engine=engine).gauss_newton()
    with pytest.warns(RuntimeWarning, match="its Gauss-Newton matrix is 0 by definition") as said:
        products = [G @ torch.ones(15).double() for _ in range(2)]
    assert len(said) == 1
    assert not torch.stack(products).any()
    penalised = Objective(model, (x, targets), lambda z, y: loss(z, y) + model[0].weight.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        G = penalised.gauss_newton()
        assert (G @ torch.ones(15).double())[:12].tolist() == [2.0] * 12


def _reductions(*more: str) -> tuple[str, ...]:
    return ("sum", "mean", *more)


TORCHS = {  # outputs and targets of 7 examples of 3 rows
    (name, reduction): (module, function, reduction, targets)
    for name, module, function, targets, reductions in (
        ("l1", nn.L1Loss, F.l1_loss, "real", _reductions()),
        ("smooth l1", nn.SmoothL1Loss, F.smooth_l1_loss, "real", _reductions()),
        ("huber", nn.HuberLoss, F.huber_loss, "real", _reductions()),
        ("poisson", nn.PoissonNLLLoss, F.poisson_nll_loss, "real", _reductions()),
        ("mse", nn.MSELoss, F.mse_loss, "real", _reductions()),
        ("soft margin", nn.SoftMarginLoss, F.soft_margin_loss, "signs", _reductions()),
        ("hinge", nn.HingeEmbeddingLoss, F.hinge_embedding_loss, "signs", _reductions()),
        ("kl", nn.KLDivLoss, F.kl_div, "soft", _reductions("batchmean")),
        ("multi margin", nn.MultiMarginLoss, F.multi_margin_loss, "labels", _reductions()),
        ("several labels", nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, "soft", _reductions()),
    )
    for reduction in reductions
}


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("case", TORCHS, ids=" ".join)
def test_torchs_losses_over_several_batches_have_the_value_of_all_examples(case, as_function):
    module, function, reduction, kind = TORCHS[case]
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(7, 4).double()
    targets = {
        "real": torch.randn(7, 3).double().abs(),
        "signs": torch.randn(7, 3).double().sign(),
        "soft": _soft(7, 3),
        "labels": _labels(7),
    }[kind]
    loss = functools.partial(function, reduction=reduction) if as_function else module(reduction=reduction)
    value = loss(model(x), targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
    batches = [(x[:5], targets[:5]), (x[5:], targets[5:])]
    for given, options in ((batches, {}), (batches, {"microbatch": 2}), ([(x, targets)], {"microbatch": 3})):
        objective = Objective(model, given, loss, **options)
        assert objective.loss() == pytest.approx(value.item(), rel=1e-12)
        torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [nn.L1Loss, nn.HuberLoss, functools.partial(nn.KLDivLoss, log_target=False)])
def test_means_over_entries_count_entries(make):
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), make()
    batches = [
        (torch.randn(n, length, 4).double(), torch.rand(n, length, 3).double()) for n, length in ((5, 2), (2, 9))
    ]
    flat = [torch.cat([t.flatten(0, 1) for t in parts]) for parts in zip(*batches, strict=True)]
    assert Objective(model, batches, loss).loss() == pytest.approx(loss(model(flat[0]), flat[1]).item(), rel=1e-12)


@pytest.mark.parametrize("loss", [nn.HuberLoss(reduction="none"), functools.partial(F.l1_loss, reduction="none")])
def test_losses_without_reduction(loss):
    with pytest.raises(ValueError, match=r"reduction must be .*, got 'none': a loss is one number"):
        get_loss(loss)


class Cubed(nn.modules.loss._Loss):
    def forward(self, z, y):
        parts = (z - y).abs() ** 3
        return parts.sum() if self.reduction == "sum" else parts.sum() / len(z)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_users_loss_with_a_reduction(reduction):
    torch.manual_seed(0)
    model, x, y, loss = nn.Linear(4, 3).double(), torch.randn(7, 4).double(), torch.randn(7, 3).double(), Cubed()
    loss.reduction = reduction
    objective = Objective(model, [(x[:5], y[:5]), (x[5:], y[5:])], loss)
    assert objective.loss() == pytest.approx(loss(model(x), y).item(), rel=1e-12)


def test_outputs_of_several_tensors_are_packed_and_unpacked():
    outputs = {"a": torch.randn(2, 3), "b": [torch.randn(2), torch.tensor([1, 2])]}
    z, unpack = pack(outputs)
    assert z.shape == (8,)
    again = unpack(2 * z)
    assert torch.equal(again["a"], 2 * outputs["a"])
    assert torch.equal(again["b"][0], 2 * outputs["b"][0])
    assert again["b"][1] is outputs["b"][1]


def _overwrite(loss, y, z):
    y[:8] = -1
    z[:] = 2


def _replace(loss, y, z):
    loss.weight = torch.tensor([1.0, 1.0, 100.0]).double()


def _scale(loss, y, z):
    loss.weight[2] = 100.0


def _ignore(loss, y, z):
    loss.ignore_index = 2


@pytest.mark.parametrize("change", [_overwrite, _replace, _scale, _ignore])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_targets_and_options_that_change_later_count(change, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))
    loss = kind(weight=torch.tensor([1.0, 5.0, 20.0]).double(), ignore_index=-1)
    parts = [(x[:10], y[:10]), (x[10:], y[10:])]
    objective = Objective(model, parts, loss)
    hessian = objective.hessian()
    objective.loss()
    change(loss, parts[0][1], parts[1][1])
    value = loss(model(x), y)
    gradient = flatten(torch.autograd.grad(value, list(model.parameters())))
    assert objective.loss() == pytest.approx(value.item())
    torch.testing.assert_close(objective.gradient(), gradient)
    hessian.refresh()
    v = torch.ones(objective.num_parameters).double()
    torch.testing.assert_close(hessian @ v, Objective(model, [(x, y)], loss).hessian() @ v)


def _loss_network(*layers: nn.Module):
    torch.manual_seed(3)
    network = nn.Sequential(*layers).double()
    return lambda z, y: F.mse_loss(network(z), y.double()[:, None].expand(-1, 3))


LOSS_NETWORKS = {  # as perceptual losses and losses between views have
    "batch normalisation": [nn.BatchNorm1d(3, affine=False)],
    "layer normalisation": [nn.LayerNorm(3), nn.Tanh()],
    "convolutions": [nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 3)],
    "weight normalisation": [nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh()],
}


@pytest.mark.parametrize("name", LOSS_NETWORKS)
def test_gauss_newton_of_a_loss_that_has_layers_of_its_own(name):
    torch.manual_seed(0)
    x, y, loss = torch.randn(9, 4).double(), torch.arange(9), _loss_network(*LOSS_NETWORKS[name])
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    v, h = torch.randn(43, generator=torch.Generator().manual_seed(1)).double(), 1e-5

    def outputs(t):
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(parameters + t * v, moved.parameters())
        return moved(x).detach()

    def slope(t):
        z = (outputs(0) + t * jv).requires_grad_()
        return torch.autograd.grad(loss(z, y), z)[0]

    jv = (outputs(h) - outputs(-h)) / (2 * h)
    expected = float((jv * (slope(h) - slope(-h))).sum() / (2 * h))
    objective = Objective(model, (x, y), loss)
    assert float(v @ (objective.gauss_newton() @ v)) == pytest.approx(expected, rel=1e-6)
    projected = projected_gauss_newton(model, x, y, loss, v[:, None])
    assert float(projected) == pytest.approx(expected, rel=1e-6)
    found = objective.hessian_by_differences() @ v
    torch.testing.assert_close(objective.hessian() @ v, found, rtol=1e-5, atol=1e-7)


def test_any_callable_is_a_loss():
    def focal(z, y):
        p = z.softmax(1).gather(1, y[:, None])[:, 0]
        return (-((1 - p) ** 2) * p.log()).mean()

    model, (x, y) = mlp(), minibatch(6)
    objective = Objective(model, [(x, y)], focal)
    v = torch.randn(objective.num_parameters).double()
    expected = central_difference(model, [(x, y)], focal, v)
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-6, atol=1e-8)
