"""Sharpness, the gradient's shares and the class gradients, measured beside a training at a bounded cost."""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvspace.batches import as_pairs
from curvspace.curvature.class_gradients import class_gradients
from curvspace.curvature.eigensolver import EigenPairs
from curvspace.curvature.tracker import SubspaceTracker
from curvspace.functional import trainable_parameters
from curvspace.inner import norm
from curvspace.losses import Loss
from curvspace.monitor.budget import Budget
from curvspace.monitor.sinks import Row, Sink, as_sinks
from curvspace.objective import Objective
from curvspace.subspace import gradient_fraction, orthonormal_basis, principal_angles, subspace_overlap

COLD_SOLVE = 30
"""Products of a solve from a random start beyond k: what the first measurement is expected to take."""


class CurvatureMonitor:
    r"""Follows the sharp directions of a loss along a training: ``monitor(step)`` after each step of any loop.

    With L the mean loss over fixed batches, H its Hessian with eigenpairs :math:`(\lambda_i, u_i)`, largest first, g
    its gradient and C the span of the class gradients, a measurement is one row of

    - ``step``, as it was given; ``wall_s``, seconds since the first call, training and measuring;
    - ``loss`` and ``gradient_norm``: L and :math:`|g|`;
    - ``sharpness``: :math:`\lambda_1` (gradient descent is unstable above 2 / learning rate); ``eigenvalue_2`` to
      ``eigenvalue_k``: the next;
    - ``residual_max``: the largest :math:`|Hu_i - \lambda_i u_i|`; ``converged``: 1 if ``tol`` was reached, else 0;
    - ``f_top``: :math:`\sum_i (u_i^\top g)^2/|g|^2` (paper B, eq. 2), and ``f_chance`` = k / P, that of a random g;
    - ``overlap_with_last``: overlap of the top subspace with that of the last measurement (paper B, eq. 5);
    - ``most_negative``: :math:`\lambda_{min}`, NaN unless asked for;
    - with ``num_classes`` also ``f_class``: share of :math:`|g|^2` inside C; ``class_overlap``: overlap of C and the
      top subspace (paper B, eq. 5); ``class_angle_first_deg`` and ``class_angle_last_deg``: the smallest and the
      largest principal angle between them, in degrees;
    - ``products``: Hessian products of this measurement; ``measure_s``: its seconds;
    - ``overhead``: seconds of measuring per second of training, so far.

    Eigenvectors are those of the last measurement, improved: a measurement costs few products once the first is made.
    The model, its gradients, buffers and modes, and the generators of torch, NumPy and Python stay as they were.

    Parameters
    ----------
    model
        The module that is trained.
    batches
        Pairs (inputs, targets) or one such pair, the same for the whole training, as for an
        :class:`~curvspace.objective.Objective`.
    loss
        As for the objective.
    k
        How many top eigenpairs.
    num_classes
        Also follow the class gradients of so many classes (integer targets (N,), outputs (N, C)).
    share
        Measuring takes at most this many seconds per second of training: measurements become rarer where they are
        dear. The first waits until it is paid for. None: no limit.
    every
        At most one measurement in so many steps.
    to
        A path of a CSV file, a :class:`~curvspace.monitor.sinks.Sink`, or a list of these.
    tol
        Of the eigenpairs, as for :func:`~curvspace.curvature.eigensolver.eigsh`.
    max_products
        Hessian products that a solve may take (default: as for ``eigsh``); ``converged`` says if they did.
    most_negative
        Measure the most negative eigenvalue each time. Without it: ``monitor.measure(step, most_negative=True)``.
    options
        Further options of the objective: ``parameters="head.*"``, its policy for batch normalisation, ``microbatch``.

    Raises
    ------
    ValueError
        At the first step at the latest, for options, batches or a loss that do not fit the model.

    Warns
    -----
    RuntimeWarning
        When a later measurement fails (training goes on), or none was affordable by the time of ``close()``.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: str | Loss | Callable[..., Tensor] = "cross_entropy",
        *,
        k: int = 5,
        num_classes: int | None = None,
        share: float | None = 0.05,
        every: int = 1,
        to: str | os.PathLike[str] | Sink | list[Any] | None = None,
        tol: float = 1e-2,
        max_products: int | None = None,
        most_negative: bool = False,
        **options: Any,
    ):
        for name, value, least in (("k", k, 1), ("every", every, 1), ("num_classes", num_classes, 2)):
            if value is not None and not (isinstance(value, Integral) and value >= least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        self.model = model
        self.batches = as_pairs(batches)
        self.k = k
        self.num_classes = num_classes
        self.every = every
        self.most_negative = most_negative
        self.budget = Budget(share)
        self.rows: list[Row] = []
        self._loss, self._options = loss, {"group": None, **options}
        self._new_tracker = partial(SubspaceTracker, tol=tol, max_products=max_products)
        self._start: float | None = None
        self._sinks = as_sinks(to)
        self._prepare()

    def __call__(self, step: int) -> Row | None:
        """After a training step: the row of a measurement if one is due, else None (which costs microseconds)."""
        first = self._start is None
        due = self.budget.tick()
        if first:
            self._calibrate()
            due = self.budget.share is None
        if not due or step % self.every:
            return None
        any_before = bool(self.rows)
        try:
            return self.measure(step)
        except Exception as error:  # training goes on, whatever the model raises
            if not any_before:
                raise
            warnings.warn(f"step {step}: curvature was not measured: {error}", RuntimeWarning, stacklevel=2)
            return None

    def measure(self, step: int, *, most_negative: bool = False) -> Row:
        """Measure now, due or not. What it costs beyond the budget is made up for by the next ones coming later."""
        if self._start is None:
            self._start = time.perf_counter()
        wanted = self.most_negative or most_negative
        self._synchronise()
        start = time.perf_counter()
        with self.budget.spending(typical=wanted == self.most_negative):
            with _untouched(self._device):
                if self._coordinates() != self._prepared_for:
                    self._prepare()
                found = self._measured(wanted)
            self._synchronise()
        spent = time.perf_counter() - start
        row: Row = {
            "step": step.item() if isinstance(step, Tensor) else step,
            "wall_s": time.perf_counter() - self._start,
            **found,
        }
        row = {**row, "measure_s": spent, "overhead": self.budget.overhead}
        self.rows.append(row)
        with self.budget.spending():
            for sink in self._sinks:
                sink.write(row)
        return row

    def require(self, model: nn.Module) -> None:
        """Raise ``ValueError`` for another network than the one that is followed, of which the numbers would be."""
        if model is not self.model:
            raise ValueError("this monitor follows another network already; make a new one for each training")

    @property
    def overhead(self) -> float:
        """Seconds of measuring per second of training so far."""
        return self.budget.overhead

    def close(self) -> None:
        """Close the sinks; a warning if the training was too short for even one measurement."""
        if not self.rows and self._start is not None:
            warnings.warn(
                f"no measurement fitted into {self.budget.share:g} of {self.budget.training_s:.1f} s of training: one "
                f"takes about {self.budget.forecast_s:.1f} s; raise share, give fewer examples, or call measure(step)",
                RuntimeWarning,
                stacklevel=2,
            )
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> CurvatureMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _coordinates(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in trainable_parameters(self.model).items()}

    def _prepare(self) -> None:
        """For the parameters that are trainable now: layers may be frozen, unfrozen, grown and pruned on the way."""
        self._prepared_for = self._coordinates()
        self._objective = Objective(self.model, self.batches, self._loss, **self._options)
        self._device = self._objective.function.device
        if not 1 <= self.k <= self._objective.num_parameters:
            raise ValueError(f"k must be between 1 and P = {self._objective.num_parameters}, got {self.k}")
        self._top = self._new_tracker(self.k, "LA")
        self._bottom = self._new_tracker(1, "SA")

    def _calibrate(self) -> None:
        """Three gradients: whether all fits together, and how long a measurement may take."""
        self._start = time.perf_counter()
        self._synchronise()
        times = [time.perf_counter()]
        with self.budget.spending(), _untouched(self._device):
            for _ in range(3):  # the first evaluation makes kernels and buffers
                self._objective.gradient()
                self._synchronise()
                times.append(time.perf_counter())
        gradient_s = min(times[2] - times[1], times[3] - times[2])
        self.budget.expect(2 * gradient_s * (COLD_SOLVE + self.k) * (2 if self.most_negative else 1))

    def _synchronise(self) -> None:
        """Work that is queued on a GPU is the training's, not ours, and the reverse."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _measured(self, most_negative: bool) -> dict[str, float]:
        loss = self._objective.loss()
        columns = self._columns()
        if not math.isfinite(loss):
            return {**columns, "loss": loss}
        before = self._top.pairs
        hessian = self._objective.hessian()
        gradient = self._objective.gradient()
        pairs = self._quietly(self._top, hessian)
        columns |= {"loss": loss, "gradient_norm": float(norm(gradient)), **self._spectrum(pairs)}
        columns["f_top"] = gradient_fraction(gradient, pairs.vectors)
        if before is not None:
            columns["overlap_with_last"] = subspace_overlap(before.vectors, pairs.vectors)
        if most_negative:
            columns["most_negative"] = float(self._quietly(self._bottom, hessian).values[0])
        if self.num_classes is not None:
            columns |= self._class_columns(gradient, pairs.vectors)
        columns["products"] = hessian.products
        return columns

    def _columns(self) -> dict[str, float]:
        """All columns of a measurement in their order, not a number yet."""
        names = ["loss", "gradient_norm", *self._eigenvalue_names, "residual_max", "converged", "f_top", "f_chance"]
        names += ["overlap_with_last", "most_negative"]
        if self.num_classes is not None:
            names += ["f_class", "class_overlap", "class_angle_first_deg", "class_angle_last_deg"]
        return dict.fromkeys([*names, "products"], math.nan)

    @property
    def _eigenvalue_names(self) -> list[str]:
        return ["sharpness", *(f"eigenvalue_{i}" for i in range(2, self.k + 1))]

    def _spectrum(self, pairs: EigenPairs) -> dict[str, float]:
        return {
            **dict(zip(self._eigenvalue_names, pairs.values.tolist(), strict=False)),  # fewer at the end of a budget
            "residual_max": float(pairs.residuals.max()),
            "converged": float(pairs.converged),
            "f_chance": len(pairs.values) / self._objective.num_parameters,
        }

    def _class_columns(self, gradient: Tensor, top: Tensor) -> dict[str, float]:
        """The class gradients over all batches: each class's mean over its examples."""
        assert self.num_classes is not None
        followed = self._followed()
        total = gradient.new_zeros(self.num_classes, gradient.numel())  # sums over examples: the same directions
        for inputs, targets in self.batches:
            c, counts = class_gradients(self.model, inputs, targets, self.num_classes, **self._class_options)
            total += c[:, followed] * counts[:, None].to(c)
        present = total.abs().amax(1) > 0
        span = orthonormal_basis(total[present].T)
        if span.shape[1] == 0:  # no class moves the model, or all is not a number
            return {}
        angles = torch.rad2deg(principal_angles(span, top))
        return {
            "f_class": gradient_fraction(gradient, span),
            "class_overlap": subspace_overlap(span, top),
            "class_angle_first_deg": float(angles[0]),
            "class_angle_last_deg": float(angles[-1]),
        }

    def _followed(self) -> Tensor:
        """Which of all trainable parameters' entries are coordinates, (P of all)."""
        names = set(self._objective.function.names)
        all_of_them = trainable_parameters(self._objective.function.model)
        parts = [torch.full((p.numel(),), name in names, device=self._device) for name, p in all_of_them.items()]
        return torch.cat(parts)

    @property
    def _class_options(self) -> dict[str, Any]:
        return {name: self._options[name] for name in ("batch_norm", "dtype") if name in self._options}

    @staticmethod
    def _quietly(tracker: SubspaceTracker, hessian: Any) -> EigenPairs:
        """A solve that stops at its budget says so in the column ``converged``, not in a warning each time."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return tracker.update(hessian)


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Generators as they were afterwards; no mode of the caller (autocast, ``no_grad``, inference) reaches inside."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002  the user's may be legacy
    devices = [device] if device.type == "cuda" else []
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
