"""Parts of the parameters, differences of gradients, the empirical Fisher matrix, an optimiser's preconditioner."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective, eigsh
from curvspace.curvature import dense_matrix, preconditioned
from tests.unit.backward_passes import OnceTanh
from tests.unit.small_networks import Fn

WEIGHT = torch.tensor([0.2, 1.0, 3.0]).double()


def _problem(n: int = 40) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3)
    ).double()
    return model, torch.randn(n, 4).double(), torch.randint(3, (n,))


@pytest.mark.parametrize("parameters", ["2.*", ["0.weight", "3.*"], "*bias"])
def test_curvature_of_a_part_is_the_block_of_the_whole(parameters):
    model, x, y = _problem()
    whole = Objective(model, (x, y))
    part = Objective(model, (x, y), parameters=parameters)
    chosen, start = [], 0
    for name, p in model.named_parameters():
        if name in part.function.names:
            chosen += range(start, start + p.numel())
        start += p.numel()
    assert part.num_parameters == len(chosen)
    torch.testing.assert_close(part.gradient(), whole.gradient()[chosen])
    for kind in ("hessian", "gauss_newton"):
        block = dense_matrix(getattr(whole, kind)())[chosen][:, chosen]
        torch.testing.assert_close(dense_matrix(getattr(part, kind)()), block, rtol=0, atol=1e-13)
        same = whole.part(parameters)
        torch.testing.assert_close(dense_matrix(getattr(same, kind)()), block, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"no trainable parameter is named 'head\.\*'"):
        Objective(model, (x, y), parameters="head.*")


def test_every_layer_and_block_in_one_call():
    model, x, y = _problem()
    objective = Objective(model, (x, y))
    layers, blocks = objective.layers(), objective.layers(depth=1)
    assert list(layers) == ["0", "2.0", "3"]
    assert list(blocks) == ["0", "2", "3"]
    full = dense_matrix(objective.hessian())
    start = 0
    for layer in layers.values():
        stop = start + layer.num_parameters
        torch.testing.assert_close(dense_matrix(layer.hessian()), full[start:stop, start:stop], rtol=0, atol=1e-13)
        start = stop
    assert start == objective.num_parameters


@pytest.mark.parametrize("engine", ["auto", "recompute"])
def test_operators_refresh(engine):
    model, x, y = _problem()
    H = Objective(model, (x, y), engine=engine).hessian()
    v = torch.ones(H.shape[0]).double()
    old = H @ v
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(H @ v, old)
    H.refresh()
    torch.testing.assert_close(H @ v, Objective(model, (x, y)).hessian() @ v)
    assert not torch.allclose(H @ v, old)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_differences_of_gradients(dtype, close):
    model, x, y = _problem()
    exact = Objective(model, (x, y)).hessian()
    torch.manual_seed(1)
    V = torch.randn(exact.shape[0], 3).double()
    expected = exact @ V
    model[1] = Fn(lambda s, x: OnceTanh.apply(x))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        Objective(model, (x, y)).hessian() @ V
    with pytest.raises(RuntimeError, match="once_differentiable"):
        Objective(model, (x, y)).gauss_newton() @ V
    plain, v = nn.Linear(4, 3).double(), torch.ones(15).double()
    for kind in ("hessian", "gauss_newton"):  # in the loss
        with pytest.raises(RuntimeError, match="once_differentiable"):
            getattr(Objective(plain, (x, y), lambda z, y: OnceTanh.apply(z).square().mean()), kind)() @ v
    H = Objective(model, (x, y), dtype=dtype).hessian_by_differences()
    found = H @ V
    error = (found.double() - expected).norm(dim=0) / expected.norm(dim=0)
    assert error.max() < close
    assert H.products == 3
    assert all(true < max(10 * estimate, 1e-9) for true, estimate in zip(error.tolist(), H.errors, strict=True))
    assert H.rounding >= max(H.errors)
    coarse = Objective(model, (x, y), dtype=dtype).hessian_by_differences(step=0.5)
    coarse @ V[:, 0]
    assert coarse.errors[0] > H.errors[0]
    pairs = eigsh(Objective(model, (x, y)).hessian_by_differences(), 2)
    torch.testing.assert_close(pairs.values, eigsh(exact, 2).values, rtol=1e-4, atol=0)


class Moved(nn.Module):
    """tanh(x w), held as w / scale + origin."""

    def __init__(self, origin: float, scale: float, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter((origin + torch.randn(4, 3).double() / scale).to(dtype))
        self.origin, self.scale = origin, scale

    def forward(self, x):
        return torch.tanh(x @ ((self.w - self.origin) * self.scale))


@pytest.mark.parametrize(
    ("origin", "scale", "dtype", "message"),
    [
        (1e6, 1.0, torch.float32, r"is lost in the rounding of parameters as large as 1.0e\+06"),
        (1e8, 1.0, torch.float32, "is lost in the rounding"),
        (1e14, 1.0, torch.float64, "is lost in the rounding"),
        (0.0, 1e9, torch.float64, r"the gradient becomes another one.*give a smaller step"),
        (0.0, 1e12, torch.float64, "the gradient becomes another one"),
    ],
)
def test_differences_that_say_nothing_are_errors(origin, scale, dtype, message):
    _, x, y = _problem()
    objective = Objective(Moved(origin, scale, dtype), (x.to(dtype), y))
    v = torch.randn(12, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        objective.hessian_by_differences() @ v
    if not origin:  # a step as small as the parameters serves
        found = objective.hessian_by_differences(step=1e-4 / scale) @ v
        torch.testing.assert_close(found, objective.hessian() @ v, rtol=1e-6, atol=0)


@pytest.mark.parametrize("origin", [0.0, 1e2, 1e3, 1e4])
def test_the_reported_error_of_differences_counts_what_rounding_takes(origin):
    _, x, y = _problem()
    objective = Objective(Moved(origin, 1.0, torch.float32), (x.float(), y))
    torch.manual_seed(5)
    v = torch.randn(12)
    H = objective.hessian_by_differences()
    found, expected = H @ v, objective.hessian() @ v
    assert float((found - expected).norm() / expected.norm()) < 2 * H.errors[0]


@pytest.mark.parametrize("power", [1, 3])
def test_differences_of_nothing_are_zero(power):
    """A linear function, and a cubic one where it is flat."""
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.randn(5, 4).double()
    H = Objective(model, (x, x), lambda z, _: (z**power).mean()).hessian_by_differences()
    assert not (H @ torch.randn(4).double()).any()


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(WEIGHT), lambda z, y: F.cross_entropy(z, y) * 3])
def test_empirical_fisher(loss):
    model, x, y = _problem()
    parameters = list(model.parameters())

    def gradient(i: int) -> Tensor:
        share = loss(model(x[i : i + 1]), y[i : i + 1]) / len(x)
        if isinstance(loss, nn.Module):
            share = share * WEIGHT[y[i]] / WEIGHT[y].sum() * len(x)
        return torch.cat([g.flatten() for g in torch.autograd.grad(share, parameters)])

    shares = torch.stack([gradient(i) for i in range(len(x))])
    objective = Objective(model, [(x[:30], y[:30]), (x[30:], y[30:])], loss)
    torch.testing.assert_close(shares.sum(0), objective.gradient())
    torch.testing.assert_close(dense_matrix(objective.empirical_fisher()), len(x) * shares.T @ shares)
    operator = objective.empirical_fisher()
    operator.vectors_at_once = 5
    eye = torch.eye(operator.shape[0]).double()
    torch.testing.assert_close(operator @ eye, len(x) * shares.T @ shares)


def test_empirical_fisher_refuses_what_has_no_examples():
    model, x, y = _problem()
    for loss in (lambda z, y: F.cross_entropy(z, y) + z.std(), lambda z, y: F.cross_entropy(z, y, WEIGHT)):
        with pytest.raises(ValueError, match="treat examples one by one"):
            Objective(model, (x, y), loss).empirical_fisher()
    penalised = Objective(model, (x, y), lambda z, y: F.cross_entropy(z, y) + model[0].weight.square().sum())
    with pytest.raises(ValueError, match="does not read the parameters"):
        penalised.empirical_fisher() @ torch.ones(83).double()


OPTIMISERS = {
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-3}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "adamax": (torch.optim.Adamax, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "centred": (torch.optim.RMSprop, {"centered": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "sgd": (torch.optim.SGD, {}),
}


@pytest.mark.parametrize(("kind", "options"), OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_preconditioner_is_what_the_optimiser_divides_by(kind, options):
    model, x, y = _problem()
    optimiser = kind(model.parameters(), lr=1e-3, **options)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    objective = Objective(model, (x, y))
    A = preconditioned(objective.hessian(), optimiser)
    expected = A.scale[:, None] * dense_matrix(objective.hessian()) * A.scale
    torch.testing.assert_close(dense_matrix(A), expected)
    torch.testing.assert_close(eigsh(A, 1).values[0], torch.linalg.eigvalsh(expected)[-1], rtol=1e-3, atol=0)
    # A step with a gradient of zero moves the parameters by the momentum alone, divided by the next step's P.
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    momenta = [optimiser.state[p].get("exp_avg") for p in model.parameters()]
    if momenta[0] is not None:
        momentum = torch.cat([m.clone().flatten() for m in momenta])
        beta = optimiser.param_groups[0]["betas"][0]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimiser.step()
        moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
        now = preconditioned(objective.hessian(), optimiser)
        torch.testing.assert_close(moved, 1e-3 * beta * momentum * now.scale**2, rtol=1e-6, atol=1e-12)


GROUPED = {
    "SGD": {},
    "Adam": {},
    "AdamW": {"weight_decay": 0.0},
    "Adamax": {},
    "RMSprop": {},
    "Adagrad": {},
    "Adagrad, decaying": {"lr_decay": 0.5},
}


@pytest.mark.parametrize("rates", [(1.0, 0.01), (0.01, 1.0), (0.3, 0.0), (0.2, 0.2)])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_different_rates(name, rates):
    """Against the step that torch takes: one that moves by M g has the bound 2 over the largest eigenvalue of M A."""
    model, x, y = _problem()
    groups = [{"params": list(model[part].parameters()), "lr": 1.0} for part in (0, 2)]
    groups[1]["params"] += list(model[3].parameters())
    optimiser = getattr(torch.optim, name.split(",")[0])(groups, lr=1.0, **GROUPED[name])
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if name != "SGD":
            for group in optimiser.param_groups:
                group["lr"] = 0.0
        optimiser.step()
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    H = Objective(model, (x, y)).hessian()
    A, dense = preconditioned(H, optimiser), dense_matrix(H)
    for group in optimiser.param_groups:
        group["lr"] = 1.0
    alike = preconditioned(H, optimiser).scale.square()  # 1/P
    sizes = [sum(p.numel() for p in group["params"]) for group in optimiser.param_groups]
    by_entry = torch.cat([torch.full((n,), rate, dtype=torch.float64) for n, rate in zip(sizes, rates, strict=True)])
    torch.testing.assert_close(max(rates) * A.scale.square(), by_entry * alike)
    moves = torch.linalg.eigvals((by_entry * alike)[:, None] * dense).real.max()
    torch.testing.assert_close(max(rates) * eigsh(A, 1).values[0], moves, rtol=1e-3, atol=0)


def test_rates_by_the_steps_that_torch_takes():
    model, x, y = _problem()
    groups = [{"params": list(model[0].parameters()), "lr": 1.0}, {"params": list(model[2:].parameters()), "lr": 0.01}]
    H = Objective(model, (x, y)).hessian()
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad):
        optimiser = kind(
            [dict(group) for group in groups], **({"lr_decay": 0.5} if kind is torch.optim.Adagrad else {})
        )
        if kind is not torch.optim.SGD:
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        # Adam by its momentum alone, the others by a gradient too small to count in P.
        gradient = [
            torch.zeros_like(p) if kind is torch.optim.Adam else torch.full_like(p, 1e-9) for p in model.parameters()
        ]
        pushed = [
            optimiser.param_groups[0]["betas"][0] * optimiser.state[p]["exp_avg"] if kind is torch.optim.Adam else g
            for p, g in zip(model.parameters(), gradient, strict=True)
        ]
        pushed = torch.cat([g.clone().flatten() for g in pushed])
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        for p, g in zip(model.parameters(), gradient, strict=True):
            p.grad = g
        if kind is torch.optim.Adam:
            optimiser.step()
            scale = preconditioned(H, optimiser).scale
            rate = 1.0
        else:
            scale = preconditioned(H, optimiser).scale
            rate = 1.0 / (1 + 0.5) if kind is torch.optim.Adagrad else 1.0
            optimiser.step()
        moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(moved, rate * pushed * scale**2, rtol=1e-5, atol=1e-15)


def test_preconditioner_errors():
    model, x, y = _problem()
    H = Objective(model, (x, y)).hessian()
    with pytest.raises(ValueError, match=r"Adam has no state for parameter '0\.weight': take a step first"):
        preconditioned(H, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match=r"does not hold parameter '0\.weight'"):
        preconditioned(H, torch.optim.Adam(model[3].parameters()))
    with pytest.raises(ValueError, match="no diagonal is known for Rprop"):
        preconditioned(H, torch.optim.Rprop(model.parameters()))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize(
    ("model", "x", "named"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)), torch.randn(6, 4), "hardsigmoid"),
        (Bags(), torch.randint(7, (6, 5)), "embedding_bag"),
    ],
)
def test_an_operation_without_second_derivative_is_named_with_what_to_do(model, x, named, kind):
    objective = Objective(model, (x, torch.arange(6) % 3))
    with pytest.raises(RuntimeError, match=rf"second derivative of {named},.*hessian_by_differences\(\)"):
        getattr(objective, kind)() @ torch.ones(objective.num_parameters)
