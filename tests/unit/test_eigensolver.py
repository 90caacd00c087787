"""Eigenpairs against dense eigendecompositions, from both ends, and what happens when there is no answer."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvspace import Objective, eigsh
from curvspace.curvature import dense_matrix
from curvspace.curvature.eigensolver import _degree, _WantedPairs
from curvspace.curvature.krylov import KrylovBasis
from tests.unit.backward_passes import by_hand
from tests.unit.small_networks import Fn


def _symmetric(n: int, seed: int = 0) -> torch.Tensor:
    A = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (A + A.T) / 2


class Counting:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix, noise=0.0):
        self.matrix, self.noise = matrix, noise
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self.products = 0

    def __matmul__(self, v):
        self.products += 1
        return self.matrix @ v + self.noise * torch.randn_like(v)


class Diagonal:
    """diag(values) as an operator."""

    def __init__(self, values):
        self.values, self.shape = values, (len(values), len(values))
        self.dtype, self.device = values.dtype, values.device

    def __matmul__(self, v):
        return self.values * v


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __enter__(self):
        self.bytes, self.tensors = 0, []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tensors = [t for t in self.tensors if t() is not None]
        made = result if isinstance(result, (tuple, list)) else [result]
        self.tensors += [weakref.ref(t) for t in made if isinstance(t, torch.Tensor)]
        storages = {
            t().untyped_storage().data_ptr(): t().untyped_storage().nbytes() for t in self.tensors if t() is not None
        }
        self.bytes = max(self.bytes, sum(storages.values()))
        return result


def _expected(values: torch.Tensor, k: int, which: str) -> torch.Tensor:
    down = values.flip(0)
    if which == "LA":
        return down[:k]
    if which == "SA":
        return values[:k]
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    return torch.cat([down[: (k + 1) // 2], down[len(down) - k // 2 :]])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize(("k", "max_basis"), [(1, None), (6, None), (7, 20)])
def test_agrees_with_dense(which, k, max_basis):
    A = _symmetric(120)
    pairs = eigsh(A, k, which, tol=1e-9, max_basis=max_basis, max_products=2000)
    torch.testing.assert_close(pairs.values, _expected(torch.linalg.eigvalsh(A), k, which), rtol=0, atol=1e-10)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(k).double(), rtol=0, atol=1e-10)
    true = (A @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-2, atol=1e-11)
    assert pairs.converged


def test_whole_spectrum_and_tiny_operators():
    A = _symmetric(9)
    torch.testing.assert_close(eigsh(A, 9, "SA").values, torch.linalg.eigvalsh(A), rtol=0, atol=1e-12)
    assert eigsh(torch.tensor([[3.0]]), 1).values.tolist() == [3.0]
    assert eigsh(torch.zeros(5, 5), 3).values.tolist() == [0.0] * 3


@pytest.mark.parametrize("copies", [2, 9])
def test_finds_every_copy_of_a_repeated_eigenvalue(copies):
    spectrum = torch.cat([torch.full((copies,), 5.0), torch.linspace(0, 1, 200)]).double()
    q, _ = torch.linalg.qr(_symmetric(len(spectrum)))
    pairs = eigsh(q * spectrum @ q.T, copies + 2, tol=1e-6)
    torch.testing.assert_close(pairs.values[:copies], torch.full((copies,), 5.0).double())
    torch.testing.assert_close(pairs.values[copies], torch.tensor(1.0).double(), rtol=0, atol=1e-6)


def test_a_start_subspace_that_converged_does_not_hide_a_new_eigenvalue():
    spectrum = torch.cat([torch.tensor([9.0, 8.0, 7.0]), torch.linspace(0, 1, 100)]).double()
    start = torch.eye(len(spectrum), dtype=torch.float64)[:, 1:4]  # the pairs of 8, 7 and 0: exact, but not the largest
    pairs = eigsh(torch.diag(spectrum), 3, v0=start)
    torch.testing.assert_close(pairs.values, spectrum[:3], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("which", "sign"), [("LA", 1.0), ("SA", -1.0), ("LM", 1.0), ("LM", -1.0), ("BE", 1.0)])
def test_of_close_eigenvalues_none_is_missed(which, sign):
    """160 eigenvalues drawn evenly above a bulk near zero: neighbours closer than the tolerance are common."""
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        outliers, bulk = 5 * torch.rand(160, generator=draw), 1e-3 * torch.randn(5840, generator=draw)
        parts = [sign * outliers, bulk] if which != "BE" else [outliers, bulk, -outliers]
        values = torch.cat(parts).sort().values
        found = eigsh(Diagonal(values), 10, which, tol=1e-2, seed=seed).values
        expected = _expected(values, 10, which)
        assert ((found - expected).abs() <= 0.02 * expected.abs()).all(), seed


def test_both_ends_of_an_indefinite_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    H = Objective(model, [(torch.randn(20, 5).double(), torch.randint(3, (20,)))]).hessian()
    values = torch.linalg.eigvalsh(dense_matrix(H))
    assert values[0] < -1e-2 < 1e-2 < values[-1]
    for which in ("LA", "SA", "BE", "LM"):
        pairs = eigsh(H, 4, which, tol=1e-9)
        torch.testing.assert_close(pairs.values, _expected(values, 4, which), rtol=0, atol=1e-10)


def test_a_random_vector_of_a_large_flat_operator_is_not_taken_for_its_negative_end():
    values = torch.zeros(200_000)
    values[:5] = torch.tensor([3.0, 2.0, 1.0, 0.5, -0.4])
    pairs = eigsh(Diagonal(values), 1, "SA", tol=0.02)
    torch.testing.assert_close(pairs.values, torch.tensor([-0.4]), rtol=0.01, atol=0)
    assert pairs.vectors[4, 0].abs() > 0.99


def _rotated(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    q, _ = torch.linalg.qr(_symmetric(len(spectrum), seed))
    A = q * spectrum.double() @ q.T
    return (A + A.T) / 2


@pytest.mark.parametrize("max_basis", [None, 12])
def test_each_pair_has_its_own_tolerance(max_basis):
    A = _rotated(torch.cat([torch.tensor([100.0]), torch.linspace(-0.1, 1, 150)]))
    pairs = eigsh(A, 2, "SA", max_basis=max_basis, max_products=2000)
    assert pairs.converged
    assert (pairs.residuals <= 1e-3 * pairs.values.abs()).all()
    torch.testing.assert_close(pairs.values[0], torch.tensor(-0.1).double(), rtol=1e-4, atol=0)


SPECTRA = {
    "indefinite": torch.linspace(-1, 2, 100) ** 3,
    "clustered": torch.cat([torch.tensor([5.0, 4.99, 4.98, 2.0, -3.0, -3.01]), torch.linspace(0, 1, 94)]),
    "degenerate": torch.cat([torch.full((5,), 4.0), torch.full((3,), -2.0), torch.linspace(0, 1, 92)]),
    "low rank": torch.cat([torch.tensor([7.0, 3.0, 1.0, -0.5]), torch.zeros(96)]),
    "zero": torch.zeros(100),
    "identity": torch.ones(100),
    "many orders of magnitude": torch.logspace(2, -8, 100) * torch.tensor([1.0, -1.0]).repeat(50),
    "tiny": torch.linspace(-1, 2, 100) * 1e-30,
    "huge": torch.linspace(-1, 2, 100) * 1e30,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_any_spectrum(name, dtype):
    A = _rotated(SPECTRA[name], seed=1).to(dtype)
    values = torch.linalg.eigvalsh(A.double())
    largest, eps = values.abs().max(), torch.finfo(dtype).eps
    for k, which, tol, max_basis in [
        (1, "LA", 1e-5, None),
        (3, "SA", 1e-5, 12),
        (6, "BE", 1e-5, None),
        (100, "LM", 0.0, None),
    ]:
        pairs = eigsh(A, k, which, tol, max_basis=max_basis, max_products=3000)
        assert pairs.converged
        u = pairs.vectors.double()
        torch.testing.assert_close(u.T @ u, torch.eye(k).double(), rtol=0, atol=200 * eps)
        residuals = (A.double() @ u - u * pairs.values.double()).norm(dim=0)
        assert (residuals <= 1.01 * (tol * pairs.values.abs()).clamp_min(30 * eps * largest)).all()
        expected = _expected(values, k, which)
        error = (pairs.values.double().abs() - expected.abs()) if which == "LM" else (pairs.values.double() - expected)
        assert (error.abs() <= 1.01 * pairs.errors.double() + 10 * eps * largest).all()


@pytest.mark.filterwarnings("error")
def test_a_small_singular_hessian_is_solved_exactly():
    torch.manual_seed(0)
    x, y, model = torch.randn(20, 4).double(), torch.randint(3, (20,)), nn.Linear(4, 3).double()
    for loss in ("cross_entropy", lambda z, t: z.mean()):
        H = Objective(model, [(x, y)], loss).hessian()
        values = torch.linalg.eigvalsh(dense_matrix(H))
        for k, which in ((15, "LA"), (3, "SA"), (3, "LA"), (1, "LM")):
            pairs = eigsh(H, k, which)
            assert pairs.converged
            torch.testing.assert_close(pairs.values, _expected(values, k, which), rtol=0, atol=1e-14)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_takes_no_more_products_than_arpack_at_its_tolerance(which):
    A = _rotated(torch.cat([torch.linspace(10, 30, 8), torch.linspace(-1, 1, 392)]))
    operator = Counting(A)
    values, _ = scipy_eigsh(
        LinearOperator(A.shape, lambda v: (operator @ torch.from_numpy(v)).numpy(), dtype=np.float64),
        5,
        which=which,
        tol=1e-4,
    )
    pairs = eigsh(A, 5, which, tol=1e-4)
    np.testing.assert_allclose(np.sort(pairs.values), np.sort(values), rtol=1e-6)
    assert pairs.products <= operator.products


def test_error_bounds_hold_and_are_sharper_than_residuals():
    A = _rotated(torch.cat([torch.linspace(5, 10, 6), torch.linspace(-1, 1, 300)]), seed=2)
    pairs = eigsh(A, 6, tol=1e-2)
    error = (pairs.values - torch.linalg.eigvalsh(A).flip(0)[:6]).abs()
    assert (error <= pairs.errors).all()
    assert pairs.errors.max() < 0.1 * pairs.residuals.max()


def test_prints_as_a_table():
    text = str(eigsh(torch.diag(torch.arange(1.0, 31.0)), 2))
    assert text.splitlines()[0].split() == ["i", "eigenvalue", "error", "residual"]
    assert text.splitlines()[1].split()[:2] == ["1", "30"]
    assert text.endswith("products, converged")


@pytest.mark.parametrize("start", [None, torch.eye(80).double()[:, :3]])
def test_an_asymmetric_operator_is_refused(start):
    A = _symmetric(80)
    eigsh(A + 1e-11 * torch.triu(A, 1), 3, v0=start)  # rounding of the products
    with pytest.raises(RuntimeError, match="not symmetric"):
        eigsh(A + 0.02 * torch.triu(A, 1), 3, v0=start)


def test_an_operator_that_is_not_linear_is_refused():
    class Quadratic(Counting):
        def __matmul__(self, v):
            return super().__matmul__(v) + 0.1 * v.square() * v.numel() ** 0.5

    with pytest.raises(RuntimeError, match=r"not symmetric|not linear"):
        eigsh(Quadratic(_symmetric(80)), 3)


class Half(Diagonal):
    """Products rounded to bfloat16."""

    def __matmul__(self, v):
        assert v.dtype == torch.bfloat16
        return self.values * v


def test_half_precision_says_what_it_cannot_tell():
    values = torch.cat([torch.tensor([300.0, 100.0, 0.5]), torch.linspace(0, 0.1, 500)]).bfloat16()
    with pytest.raises(ValueError, match=r"tol 0\.001 is below the rounding of torch.bfloat16, 7\.8e-03"):
        eigsh(Half(values), 2)
    pairs = eigsh(Half(values), 2, tol=0.05)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, torch.tensor([300.0, 100.0]), rtol=0.02, atol=0)
    with pytest.warns(RuntimeWarning, match="torch.bfloat16 may be too inexact"):
        assert not eigsh(Half(values), 3, tol=0.02).converged  # the third is lost in the rounding of the first


def test_memory_is_the_basis_and_little_more():
    n, k = 200_000, 4
    A = Diagonal(torch.cat([torch.linspace(10, 20, k), torch.linspace(-1, 1, n - k)]))
    held = []
    with PeakMemory() as peak:
        held.append(eigsh(A, k, max_basis=2 * k + 10))
    assert held[0].converged
    assert peak.bytes <= (2 * k + 10 + k + 6) * n * 4 + 2**16


def test_single_precision():
    A = _symmetric(150)
    pairs = eigsh(A.float(), 5, tol=1e-4)
    assert pairs.values.dtype == torch.float32
    torch.testing.assert_close(pairs.values.double(), torch.linalg.eigvalsh(A).flip(0)[:5], rtol=1e-5, atol=0)


def test_counts_products_and_stops_at_the_budget_with_a_warning():
    A = Counting(_symmetric(300))
    with pytest.warns(RuntimeWarning, match="not converged after 12 products"):
        pairs = eigsh(A, 4, tol=1e-10, max_products=12)
    assert not pairs.converged
    assert pairs.products == A.products == 12
    assert pairs.residuals.max() > 1e-10


def test_is_reproducible_and_reports_progress(capsys):
    A = _symmetric(60)
    first, second = eigsh(A, 3, seed=3), eigsh(A, 3, seed=3, progress=True)
    assert torch.equal(first.vectors, second.vectors)
    assert "product" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be between 1 and P = 6, got 0"),
        ({"k": 7}, "k must be between 1 and P = 6, got 7"),
        ({"k": 2, "which": "XX"}, "which must be"),
        ({"k": 2, "tol": -1.0}, "tol must not be negative"),
        ({"k": 2, "tol": 1e-17}, "below the rounding of torch.float64"),
        ({"k": 2, "v0": torch.ones(5)}, r"v0 must be \(P,\) or \(P, m\) with P = 6"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        eigsh(_symmetric(6), **arguments)


def test_operators_that_cannot_be_solved():
    with pytest.raises(RuntimeError, match="not deterministic"):
        eigsh(Counting(_symmetric(50), noise=0.1), 2)
    with pytest.raises(RuntimeError, match="not finite"):
        eigsh(torch.full((4, 4), float("nan")), 2)
    with pytest.raises(ValueError, match="square"):
        eigsh(torch.ones(3, 4), 2)


def _fitted(dtype: torch.dtype, width: float, loss: str, seed: int) -> Objective:
    """A network whose outputs, as large as ``width``, are on the right side for every example."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight.data.mul_(width)
    x = torch.randn(20, 4)
    z = model(x).detach()
    return Objective(model, [(x, z.argmax(1) if loss == "cross_entropy" else (z > 0).float())], loss, dtype=dtype)


@pytest.mark.filterwarnings("ignore:eigsh. not converged")
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize("which", ["LA", "BE"])
@pytest.mark.parametrize("width", [3e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_curvature_of_a_network_that_has_fitted_its_data_is_rounding(dtype, width, which, loss):
    for seed in range(3):
        pairs = eigsh(_fitted(dtype, width, loss, seed).hessian(), 2, which)
        values = dense_matrix(_fitted(torch.float64, width, loss, seed).hessian()).double()
        values = torch.linalg.eigvalsh((values + values.T) / 2)
        expected = values[[-1, -2]] if which == "LA" else values[[-1, 0]]
        terms = 10 * width**2 * torch.finfo(dtype).eps
        assert ((pairs.values.double() - expected).abs() <= terms + 1e-3 * expected.abs()).all()


@pytest.mark.parametrize("width", [1.0, 1e2, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_second_derivative_is_found_however_well_the_data_are_fitted(dtype, width):
    """Of x², which lacks symmetry: that of the sum in each entry of a row is taken from the next."""
    wrong = by_hand(torch.square, lambda g, x: 2 * g * (x + x.roll(1, -1) - x.roll(1, -1).detach()))
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    layers[2].weight.data.mul_(width)
    model = Fn(lambda s, x: s.layers(wrong(s.scale * x)), scale=nn.Parameter(torch.randn(4)), layers=layers)
    x = torch.randn(20, 4)
    y = model(x).detach().argmax(1)
    y[0] = (y[0] + 1) % 3
    with pytest.raises(RuntimeError, match=r"not symmetric|off by .* of the difference of first derivatives"):
        eigsh(Objective(model, [(x, y)], dtype=dtype).hessian(), 2)


@pytest.mark.parametrize(
    ("matrix", "k", "tol", "said"),
    [
        (torch.eye(4).long(), 1, 1e-3, "real floating type"),
        (torch.eye(4).to(torch.complex64), 1, 1e-3, "real floating type"),
        (torch.eye(4), 2.0, 1e-3, "whole number"),
        (torch.eye(4), 2, float("nan"), "tol must not be negative or NaN"),
    ],
)
def test_what_has_no_meaning_is_refused(matrix, k, tol, said):
    with pytest.raises(ValueError, match=said):
        eigsh(matrix, k, tol=tol)


def test_a_matrix_that_requires_gradients():
    matrix = torch.diag(torch.arange(5.0)).requires_grad_()
    assert eigsh(matrix, 1).values.tolist() == pytest.approx([4.0])


@pytest.mark.parametrize(("which", "sign"), [("LA", 1), ("SA", -1), ("LM", 1)])
@pytest.mark.parametrize("gap", [0.0, 1e-17, 1e-16, 1e-13])
def test_what_a_probe_finds_may_be_as_large_as_what_is_wanted(which, sign, gap):
    """The rest of the spectrum ends where the wanted values do, to rounding."""
    values = sign * torch.tensor([2.0] * 4 + [2.0 - gap] * 4 + [1.0, 0.0, 0.5, 0.1] * 5).double()
    rotation = torch.linalg.qr(_symmetric(len(values)))[0]
    start = rotation[:, :2] + 1e-3 * _symmetric(len(values), 1)[:, :2]
    pairs = eigsh((rotation * values) @ rotation.T, 2, which, 1e-6, start)
    assert pairs.values.tolist() == pytest.approx([2 * sign] * 2)


def test_a_gap_below_rounding_asks_for_every_degree():
    basis = KrylovBasis(torch.eye(9).double(), 9, torch.Generator())
    pairs = _WantedPairs(1, torch.tensor([1e-20]).double(), torch.eye(1).double(), [0], torch.zeros(1), 1e-3, 0.0)
    assert _degree(torch.tensor([-1.0, 0.0]).double(), pairs, "LA", basis) == math.inf
