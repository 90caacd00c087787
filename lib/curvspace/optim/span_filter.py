r"""A filter between the gradient and any optimiser of torch: what lies in a small span is taken out or damped.

.. math:: g' = g - QQ^\top g + \alpha\,m, \qquad m = QQ^\top g \text{ or its running mean}

The optimiser goes on from g' as from any gradient; its momentum is not projected. In a loop of one's own::

    opt = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, nesterov=True)
    span = SpanFilter(opt, model, num_classes=10)       # one
    for x, y in data:
        opt.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        span.filter(x, y)                               # two
        opt.step()
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from curvspace.batches import batch_size, select
from curvspace.curvature.class_batches import number_of_classes, require_part_exact
from curvspace.curvature.class_gradients import class_gradients
from curvspace.functional import flatten, trainable_parameters, unflatten
from curvspace.inputs import Inputs
from curvspace.optim.base import copied, require, require_count, require_numbers
from curvspace.optim.bases import Basis, ClassGradients, MeanDirections, PastUpdates, RandomDirections
from curvspace.optim.first_order import FirstOrder, LossLike
from curvspace.optim.mean_directions import joint_span, transposed_groups
from curvspace.optim.span import Span

Kind = Literal["mean-directions", "class-gradients", "past-updates", "random-directions"]
KINDS = get_args(Kind)
Identity = tuple[Tensor, torch.Size, torch.dtype]
"""A parameter as it was when it was filtered: cast to another type, it is another one."""


class SpanFilter(FirstOrder):
    r"""``SpanFilter(optimizer, model, num_classes)``: then ``filter(x, y)`` before ``optimizer.step()``.

    It is an optimiser itself: ``step(x, y)`` does the whole step, ``step()`` the wrapped optimiser's own; its param
    groups are the wrapped one's, and its state dict holds both. Learning-rate schedules, clipping and the accumulation
    of gradients need nothing: filter once, when ``.grad`` is complete, before or after clipping. With a ``GradScaler``
    call ``scaler.unscale_`` first. Under ``DistributedDataParallel`` the class gradients are averaged over its
    processes, whose spans are then the same.

    Parameters
    ----------
    optimizer
        A ready optimiser of parameters of the model; gradients of other parameters are left alone.
    model
        Called as ``model(x)``, ``model(*x)`` or ``model(**x)``, with outputs (N, C), for the class gradients alone.
    num_classes
        C; None: the number of the model's outputs.
    spans
        One or several of ``"mean-directions"`` (each unit's mean gradient over its inputs: with ``gain=0`` gradient
        centralisation, arXiv 2004.01461), ``"class-gradients"`` (paper A, eq. 8 and 16), ``"past-updates"`` (the last
        ``past_updates`` changes of the parameters) and ``"random-directions"`` (C of them, drawn anew: the control).
        Q is an orthonormal basis of their sum, on which their order has no bearing.
    gain
        :math:`\alpha`: how much of the gradient's part in the span is left, 0 to 1.
    beta
        Decay of the running mean m of :math:`QQ^\top g`, corrected for its start at zero; 0: no mean. When the span
        moves, m is projected on the new one.
    refresh_every
        Steps between refreshes of the span. Mean directions are always the same.
    gamma
        Decay of the class gradients' running average, over refreshes.
    fraction
        Share of the minibatch on which class gradients are taken, the first of its examples. 1 for a model that does
        not treat examples one by one.
    batch_norm
        Statistics of batch normalisation in the class gradients: ``"running"`` (stored), ``"batch"`` (one backward
        pass per class) or None (the module's mode).
    loss
        For ``step(x, y)``.
    seed
        Of the random directions.

    Raises
    ------
    ValueError
        For a value out of range, for sparse gradients, and for class gradients without integer targets (N,), without
        outputs (N, C), or of a part of examples that the model mixes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        num_classes: int | None = None,
        *,
        spans: Sequence[Kind] = ("class-gradients",),
        gain: float = 0.0,
        beta: float = 0.0,
        refresh_every: int = 10,
        gamma: float = 0.9,
        fraction: float = 0.5,
        past_updates: int = 10,
        batch_norm: Literal["batch", "running"] | None = "running",
        loss: LossLike = "cross_entropy",
        seed: int = 0,
    ):
        require(isinstance(optimizer, torch.optim.Optimizer), "optimizer", optimizer, "an optimiser, not its class")
        chosen: tuple[str, ...] = (spans,) if isinstance(spans, str) else tuple(spans)
        valid = bool(chosen) and set(chosen) <= set(KINDS) and len(set(chosen)) == len(chosen)
        require(valid, "spans", spans, f"one or several, each once, of {', '.join(KINDS)}")
        require_numbers(gain=gain, beta=beta, gamma=gamma, fraction=fraction)
        require(0 <= gain <= 1, "gain", gain, "in [0, 1]")
        require(0 <= beta < 1, "beta", beta, "in [0, 1)")
        require_count("refresh_every", refresh_every)
        require(0 < fraction <= 1, "fraction", fraction, "in (0, 1]")
        require_count("num_classes", num_classes, optional=True)
        if "past-updates" in chosen:
            require_count("past_updates", past_updates)
        super().__init__(model, optimizer, loss)
        self.spans, self.gain, self.beta, self.fraction = chosen, gain, beta, fraction
        self.refresh_every, self.batch_norm = refresh_every, batch_norm
        self.num_classes = num_classes
        self._options = (gamma, past_updates, seed)
        self._log: dict[str, Any] = {}
        self._evaluations: int | None = None
        """How often the gradient has been filtered within the present step; None outside of one."""
        optimizer.register_step_post_hook(partial(_note_step, weakref.ref(self)))
        self._start()

    def _start(self) -> None:
        gamma, past_updates, seed = self._options
        makers: dict[str, Callable[[], Basis]] = {
            "mean-directions": MeanDirections,
            "class-gradients": lambda: ClassGradients(gamma, orthonormal=True),
            "past-updates": lambda: PastUpdates(past_updates),
            "random-directions": lambda: RandomDirections(self._classes(None), seed, redraw=True),
        }
        self.bases = {kind: makers[kind]() for kind in self.spans}
        self.span: Span | None = None
        """The span as it was last refreshed; None before the first call of :meth:`filter`."""
        self._calls = 0
        self._space: list[Identity] | None = None
        self._mean: dict[str, Tensor] = {}
        self._last: Tensor | None = None
        self._known: list[Tensor] = []
        self._transposed: dict[Tensor, int] = {}

    @torch.no_grad()
    def filter(self, inputs: Inputs | None = None, targets: Tensor | None = None) -> None:
        """Replace the parameters' ``.grad`` by g'. Class gradients need the minibatch, the other spans do not."""
        parameters = self._moved()
        gradients = [p.grad for p in parameters]
        if any(g is not None and g.is_sparse for g in gradients):
            raise ValueError("SpanFilter cannot filter sparse gradients; use sparse=False in the embedding")
        if self.spans == ("mean-directions",) and (self.gain == 0 or self.beta == 0):
            self._centralise(parameters, gradients)
            return
        present = [p if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        dtype = torch.promote_types(present[0].dtype, torch.float32)
        whole = flatten(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
        whole = whole.to(dtype)
        again = bool(self._evaluations)
        if not again:
            self._enter_space(parameters)
            self._note_update(parameters, dtype)
            if self._calls % self.refresh_every == 0:
                self._refresh(parameters, whole, inputs, targets)
            self._calls += 1
        if self._evaluations is not None:
            self._evaluations += 1
        if self.span is None:  # no past update yet
            return
        coordinates = self.span.coordinates(whole)
        inner = self.span.combine(coordinates)
        rest = whole - inner
        self._log = {"span_share": coordinates.square().sum() / whole.square().sum()}
        if self.gain > 0:
            rest.add_(self._running(inner, moves=not again), alpha=self.gain)
        pairs = zip(gradients, unflatten(rest, present), strict=True)
        written = [(g, new) for g, new in pairs if g is not None]
        if written:
            torch._foreach_copy_([g for g, _ in written], [new for _, new in written])

    def step(self, inputs: Any = None, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        """``step(x, y)``: gradient, filter and step, returns the loss; ``step()``: the wrapped optimiser's step.

        Of several evaluations in one step (``LBFGS``), also in ``step(closure)``, the first moves span and mean.
        """
        if targets is None and inputs is not None and not callable(inputs):
            raise ValueError("step(inputs, targets) needs the targets; after filter(inputs, targets), call step()")
        self._evaluations = 0
        try:
            if targets is None:
                return self.inner.step(*([] if inputs is None else [inputs]))
            return super().step(inputs, targets)
        finally:
            self._evaluations = None

    def log(self) -> dict[str, Any]:
        r"""``span_share``: :math:`|QQ^\top g|^2/|g|^2` (not for mean directions alone, which cost nothing)."""
        return self._log

    def _gradient(self, inputs: Inputs, targets: Tensor) -> Tensor:
        loss = super()._gradient(inputs, targets)
        self.filter(inputs, targets)
        return loss

    def _enter_space(self, parameters: Sequence[Tensor]) -> None:
        """Begin anew where other parameters are filtered than at the last call: some were frozen, let loose, replaced.

        As many numbers are not the same space: a layer may have been frozen while another of its size was let loose.
        """
        known = self._space
        self._space = [(p, p.shape, p.dtype) for p in parameters]
        if known is not None and not _same(known, self._space):
            present = self._space
            self._start()
            self._space = present

    def _centralise(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Mean directions alone, tensor by tensor."""
        if len(self._known) != len(parameters) or any(map(operator.is_not, self._known, parameters)):
            self._known, self._transposed = list(parameters), transposed_groups(self.model)
        for p, g in zip(parameters, gradients, strict=True):
            if g is None or g.ndim < 2:
                continue
            groups = self._transposed.get(p, 0)
            part = g.unflatten(0, (groups, -1)) if groups else g
            entries = (1, *range(3, part.ndim)) if groups else tuple(range(1, g.ndim))
            if math.prod(part.shape[d] for d in entries) > 1:
                part.sub_(part.mean(entries, keepdim=True), alpha=1 - self.gain)

    def _refresh(self, parameters: list[Tensor], whole: Tensor, inputs: Any, targets: Tensor | None) -> None:
        for basis in self.bases.values():
            if isinstance(basis, ClassGradients):
                if targets is None:
                    raise ValueError("class gradients need the minibatch: call filter(inputs, targets)")
                basis.average(*_finite(*self._class_gradients(inputs, targets, whole.dtype)))
            elif isinstance(basis, MeanDirections):
                basis.lay_out(self.model, parameters)
            else:
                basis._refresh(None, whole)  # type: ignore[arg-type]  # these look at no minibatch
        self._join()
        if self._mean and self.span is not None:
            self._mean["sum"] = self._mean["sum"] - self.span.reject(self._mean["sum"])

    def _join(self) -> None:
        spans = [basis.span for basis in self.bases.values() if basis.span is not None]
        self.span = joint_span(spans) if spans else None

    def _class_gradients(self, inputs: Inputs, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the share of the minibatch, with a column for each filtered parameter; the counts (C,)."""
        n = batch_size(targets)
        m = max(1, round(self.fraction * n))
        if m < n:
            require_part_exact(self.model, inputs, targets, self.fraction, batch_norm=self.batch_norm)
        x, y = select((inputs, targets), slice(0, m), size=n)
        with torch.autocast(targets.device.type, enabled=False):
            c, counts = class_gradients(
                self.model,
                x,
                y,
                self._classes(inputs),
                batch_norm=self.batch_norm,
                dtype=dtype,
            )
        share = m / n
        self.costs.forward += share
        self.costs.backward += share
        if not self.ranks.alone:
            sums, counts = self.ranks.total([c * counts[:, None], counts])
            c = sums / counts.clamp_min(1)[:, None]
        everything = list(trainable_parameters(self.model).values())
        kept = {id(p) for p in self._moved()}
        if len(kept) < len(everything):
            columns = c.split([p.numel() for p in everything], dim=1)
            c = torch.cat([part for part, p in zip(columns, everything, strict=True) if id(p) in kept], dim=1)
        return c, counts

    def _classes(self, inputs: Inputs | None) -> int:
        if self.num_classes is None:
            if inputs is None:
                raise ValueError("num_classes must be given for random directions, got None")
            self.num_classes = number_of_classes(self.model, inputs)
        return self.num_classes

    def _running(self, inner: Tensor, moves: bool) -> Tensor:
        """m: the part in the span, or its running mean, which takes finite values only (a scaler skips the others)."""
        if self.beta == 0:
            return inner
        if not self._mean:
            self._mean = {"sum": torch.zeros_like(inner), "weight": inner.new_zeros(())}
        ok = torch.isfinite(inner).all() & moves
        for name, value in (("sum", inner), ("weight", torch.ones_like(self._mean["weight"]))):
            new = self.beta * self._mean[name] + (1 - self.beta) * value
            self._mean[name] = torch.where(ok, new, self._mean[name])
        return self._mean["sum"] / self._mean["weight"].clamp_min(torch.finfo(inner.dtype).tiny)

    def _note_update(self, parameters: list[Tensor], dtype: torch.dtype) -> None:
        """Past updates are what has become of the parameters since the last call."""
        basis = self.bases.get("past-updates")
        if basis is None:
            return
        now = flatten(p.detach() for p in parameters).to(dtype)
        if self._last is not None:
            basis.record(self._last - now)
        self._last = now

    def _made_of(self) -> dict[str, Any]:
        return {**super()._made_of(), "spans": sorted(self.spans)}

    def _extra_state(self) -> dict[str, Any]:
        bases = {kind: copied(basis.state) for kind, basis in self.bases.items()}
        return {
            "bases": bases,
            "calls": self._calls,
            "space": self._positions(),
            "mean": copied(self._mean),
            "last": self._last,
        }

    def _positions(self) -> list[Any] | None:
        """The filtered parameters, for a file: their positions in the model, and their shapes."""
        if self._space is None:
            return None
        positions = {id(p): i for i, p in enumerate(self.model.parameters())}
        return [[positions.get(id(p), -1), list(shape)] for p, shape, _ in self._space]

    def _at_positions(self, saved: list[Any] | None) -> list[Identity] | None:
        """Those of :meth:`_positions`; a parameter that is not there is like none of the model's."""
        if saved is None:
            return None
        parameters = dict(enumerate(self.model.parameters()))
        found = [(parameters.get(i, torch.empty(0, device="cpu")), torch.Size(shape)) for i, shape in saved]
        return [(p, shape, p.dtype) for p, shape in found]

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        device = self._moved()[0].device
        self._calls, self._mean = state["calls"], copied(state["mean"], device)
        self._space = self._at_positions(state.get("space"))
        self._last = None if state["last"] is None else state["last"].to(device)
        for kind, basis in self.bases.items():
            basis.load(copied(state["bases"][kind], device))
        self._join()


def _finite(c: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """A minibatch with a gradient that is not finite counts as empty: a scaler skips its step, a mean would keep it."""
    ok = torch.isfinite(c).all()
    return torch.where(ok, c, torch.zeros_like(c)), counts * ok


def _note_step(span: weakref.ref[SpanFilter], *_: object) -> None:
    """A scheduler of the filter asks it whether a step was taken, which may have been the wrapped optimiser's own."""
    if (known := span()) is not None:
        known._opt_called = True  # type: ignore[attr-defined]  # torch's own flag


def _same(a: Sequence[Identity], b: Sequence[Identity]) -> bool:
    """Whether both are the same parameters in the same shapes, types and order."""
    return len(a) == len(b) and all(p[0] is q[0] and p[1:] == q[1:] for p, q in zip(a, b, strict=True))


def span_filter(
    model: nn.Module, num_classes: int, lr: float, *, base: Mapping[str, Any], seed: int = 0, **options: Any
) -> SpanFilter:
    """:class:`SpanFilter` around the optimiser of a config's block, ``base``; ``options`` are the filter's own.

    ``{kind: span-filter, base: {kind: sgd, momentum: 0.9, nesterov: true}, spans: [mean-directions]}``
    """
    from curvspace.optim.registry import build

    if "kind" not in base:
        raise ValueError(f"base needs the kind of the optimiser that is wrapped, got {dict(base)!r}")
    own = {key: value for key, value in base.items() if key != "kind"}
    inner = build(base["kind"], own, model, num_classes, lr)
    if type(inner) is not FirstOrder:
        raise ValueError(f"base.kind = {base['kind']!r} does not step from .grad alone, so it cannot be filtered")
    return SpanFilter(inner.inner, model, num_classes, seed=seed, **options)
