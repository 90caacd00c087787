r"""A model, a loss and weighted batches as one function of the parameters.

.. math:: L(\theta) = \sum_b w_b L_b(\theta), \qquad w_b = W_b / \sum_{b'} W_{b'},

with L_b the mean loss of batch b and W_b its weight: its number of examples, or, for the losses known by name, what
their mean divides by (labels that count, class weights, entries). Then L is the loss of all examples at once.
"""

from __future__ import annotations

import copy
import glob
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from curvspace.arithmetic import in_own_arithmetic
from curvspace.batches import Batched, as_pairs, could_be_one_example, layout, one_example, require_known_sizes
from curvspace.curvature.derivatives import Matrix, compare_derivatives
from curvspace.curvature.determinism import (
    require_deterministic_loss,
    require_deterministic_outputs,
)
from curvspace.curvature.differences import DifferenceHessianOperator
from curvspace.curvature.fingerprint import fingerprint, values_mark
from curvspace.curvature.fisher import EmpiricalFisherOperator
from curvspace.curvature.frozen import BatchNorm, FrozenModel, untied
from curvspace.curvature.independence import require_examples_first, seem_independent, spread
from curvspace.curvature.linearisation import Batch, Point, mean_gradient
from curvspace.curvature.operators import (
    CurvatureOperator,
    Engine,
    GaussNewtonOperator,
    HessianOperator,
    zero_gauss_newton,
)
from curvspace.curvature.split import cache_friendly_size, cut, within_memory
from curvspace.differentiation import without_graph
from curvspace.errors import refuse_options
from curvspace.inputs import tensors_in
from curvspace.loss_state import require_no_reference
from curvspace.losses import Loss, get_loss
from curvspace.losses.recognised import options_of, plain_variables
from curvspace.outputs import output_tensors
from curvspace.threads import one_at_a_time

Result = TypeVar("Result")

Operator = TypeVar("Operator", bound=CurvatureOperator)

SPLIT_ABOVE = 256
"""Batches up to this size are never cut for the processor's caches: finding the best size would not pay."""


class Objective:
    """Loss, gradient and curvature operators of a model on a fixed set of batches.

    Parameters
    ----------
    model
        Any ``nn.Module``; its trainable parameters are the P coordinates, in ``named_parameters()`` order.
    batches
        Pairs (inputs, targets), or one such pair. Inputs: a tensor (``model(x)``), a tuple (``model(*x)``), a mapping
        (``model(**x)``). A mapping with an entry ``labels`` is such a pair too.
    loss
        ``"cross_entropy"``, ``"mse"`` (half the squared distance), another name of :data:`curvspace.losses.KNOWN`, one
        of torch's losses, or a callable(outputs, targets) -> mean over the examples. Outputs that are mappings, tuples
        or objects go to a callable as they are, to the others by their ``logits``. A callable may read the model's
        parameters (a penalty).
    engine, memory_budget
        ``"linearize"`` keeps each batch's gradient graph, ``"recompute"`` rebuilds it for each product,
        ``"auto"`` keeps as many as ``memory_budget`` bytes allow (default: a share of the free memory).
    batch_norm
        How batch normalisation behaves: ``"batch"`` or ``"running"`` statistics, ``None``: the module's present
        mode. Running statistics are never changed.
    dropout_seed
        ``None`` turns dropout off; an integer fixes its masks.
    dtype
        Evaluate in this floating type, for example ``torch.float64``.
    microbatch
        Evaluate at most this many examples at a time; ``None``: batches as they are; ``"auto"``: on a CPU, as many
        as suit its caches, where that does not change the function.
    batched
        Which inputs have the examples along their first dimension, by position or key; ``()``: none. By default those
        as long as the targets.
    parameters
        Names or patterns (``"head.*"``) of the parameters that are the P coordinates; ``None``: all trainable ones.
    group
        A ``torch.distributed`` process group whose ranks each hold a shard of the batches; ``None``: this process
        alone.
    """

    @one_at_a_time
    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
        *,
        engine: Engine = "auto",
        batch_norm: BatchNorm = None,
        dropout_seed: int | None = None,
        dtype: torch.dtype | None = None,
        microbatch: int | Literal["auto"] | None = "auto",
        memory_budget: int | None = None,
        batched: Batched = None,
        parameters: str | Sequence[str] | None = None,
        group: Any = None,
        **old: object,
    ):
        refuse_options("Objective", {"state": "batch_norm"}, old)
        self.model = model
        self.function = FrozenModel(model, batch_norm, dropout_seed, dtype)
        if parameters is not None:
            self.function = self.function.restricted(untied(self.function, parameters))
        self._loss = loss
        self._loss_function = get_loss(loss)
        self.engine: Engine = engine
        self.memory_budget = memory_budget
        self.group = group
        self._microbatch = microbatch
        self._parts: tuple[Any, list[Batch]] | None = None
        self._fitting: int | None = None  # examples at a time that fitted, once memory has run out
        if isinstance(microbatch, int) and self.function.examples_interact:
            raise ValueError("microbatch would change batch statistics or dropout masks; pass smaller batches instead")
        self._all = []
        for i, (x, y) in enumerate(as_pairs(batches)):
            size, flags = layout(i, x, y, batched)
            self._all.append(Batch(x, y, 0.0, i, size, flags))
        self.num_examples = int(self._summed(self._scalar(sum(b.size for b in self._all))))
        if len(self._all) > 1 or group is not None:
            require_known_sizes([(b.inputs, b.targets) for b in self._all], batched, self._loss_function.weight)
        self._weighed = (*self._weighed_for(), self._weigh(self._local_weights()))
        if batched is None:
            self._require_batches()
            require_examples_first(self.function, self._given, self._loss_function)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are, and everything computed."""
        return self.function.device

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.function.size

    @property
    def policy(self) -> dict[str, str]:
        """The policy, in words for an output table."""
        return self.function.policy

    @property
    @one_at_a_time
    def batches(self) -> list[Batch]:
        """What is evaluated at a time, with weights that sum to 1.

        Found once, or anew where the model was changed, or the parameters and the loss is any callable.

        Raises
        ------
        ValueError
            If a ``microbatch`` is asked for that would change the function.
        """
        here = self._cut_for()
        if self._parts is None or here is None or here != self._parts[0]:
            with torch.inference_mode(False):
                self._parts = here, self._cut()
        return self._parts[1]

    @property
    def batches_for_all_parameters(self) -> list[Batch]:
        """The same for whoever evaluates elsewhere: as given where the loss is any callable, tried here only."""
        return self.batches if all(self.loss_function.adds_up(b.targets) for b in self._given) else self._given

    @property
    def loss_function(self) -> Loss:
        """The loss, of torch's modules with their present options."""
        self._renew()
        return self._loss_function

    @property
    def _given(self) -> list[Batch]:
        """The batches that count, with weights that sum to 1 (over all ranks)."""
        self._renew()
        return self._weighed[2]

    def _renew(self) -> None:
        """The loss and the weights anew where targets were overwritten, or options of the loss."""
        mark, held = self._weighed_for()
        if mark == self._weighed[0]:
            return
        self._loss_function = get_loss(self._loss)
        local = self._local_weights()
        if local != self._weights and self.group is not None:  # the other ranks may not know
            raise RuntimeError("the targets' weights have changed since this objective was made: make a new one")
        given = self._weighed[2] if local == self._weights else self._weigh(local)
        self._weighed = mark, held, given

    def _weighed_for(self) -> tuple[Any, list[Any]]:
        """What the weights were found for: objects and how often each was changed, and what keeps these objects."""
        held = options_of(self._loss)
        changes = [x._version for x in held if isinstance(x, Tensor) and not x.is_inference()]
        return (
            list(map(id, held)),
            changes,
            [[t._version for t in tensors_in(b.targets) if not t.is_inference()] for b in self._all],
        ), held

    def _local_weights(self) -> list[float]:
        return [self._loss_function.weight(b.targets, b.size) for b in self._all]

    def _weigh(self, weights: list[float]) -> list[Batch]:
        self._weights, self._parts = weights, None
        loss = self._loss_function
        total = 1.0
        if loss.reduction == "mean":
            total = float(self._summed(self._scalar(sum(weights))))
            if total == 0:
                raise ValueError(f"{loss.name}: no target counts, all are ignored or have weight 0")
        return [replace(b, weight=w / total) for b, w in zip(self._all, weights, strict=True) if w]

    def _cut_for(self) -> Any:
        """What the parts are found for: equal where they still make the same function. None: try each time."""
        if not self._may_be_cut():
            return ()
        batch = max(self._given, key=lambda b: b.size)
        known = all(self.loss_function.adds_up(b.targets) for b in self._given)
        called_with = batch.inputs if known else (batch.inputs, self._loss, plain_variables(self._loss))
        held = fingerprint(self.function.model, self.function.names, called_with, batch.flags)
        if held is None or known:
            return held
        return held, values_mark(self.function.originals())

    def _may_be_cut(self) -> bool:
        largest = max((b.size for b in self._given), default=0)
        if isinstance(self._microbatch, int):
            return largest > self._microbatch
        automatic = self._microbatch == "auto" and self.function.device.type == "cpu" and largest > SPLIT_ABOVE
        return automatic or self._fitting is not None

    def _cut(self) -> list[Batch]:
        if self._fitting is None:
            return self._cut_as_asked()
        return cut(self._point(), self._given, self._fitting) or self._cut_as_asked()

    def _cut_as_asked(self) -> list[Batch]:
        if isinstance(self._microbatch, int):
            parts = cut(self._point(), self._given, self._microbatch)
            if parts is None:
                raise ValueError(
                    f"microbatch={self._microbatch} would change the function: the model or the loss does not treat "
                    "examples one by one (compared on whole and parts); pass microbatch=None"
                )
            return parts
        largest = max((b.size for b in self._given), default=0)
        if self._microbatch is None or self.function.device.type != "cpu" or largest <= SPLIT_ABOVE:
            return self._given
        point = self._point()
        batch = next(b for b in self._given if b.size == largest)
        if self.function.examples_interact or not seem_independent(self.function, batch.inputs, largest, batch.flags):
            return self._given
        return cut(point, self._given, cache_friendly_size(point, batch)) or self._given

    @one_at_a_time
    @torch.inference_mode(False)
    @in_own_arithmetic
    def loss(self) -> float:
        """The mean loss L at the model's present parameters."""
        point = self._point()

        def total(batches: list[Batch]) -> Tensor:
            parts = [b.weight * without_graph(partial(point.value, b)).double() for b in batches]
            return torch.stack(parts).sum() if parts else self._scalar(0)

        return float(self._summed(self._within_memory(total)))

    @one_at_a_time
    @torch.inference_mode(False)
    @in_own_arithmetic
    def gradient(self) -> Tensor:
        """The gradient of L at the model's present parameters, (P,)."""
        point = self._point()
        return self._summed(self._within_memory(lambda batches: mean_gradient(point, batches)))

    @one_at_a_time
    def hessian(self) -> HessianOperator:
        """The Hessian of L, a copy at the time of the call: later changes of the model need ``H.refresh()``.

        A loss that reads the parameters itself (a penalty) has its share in it.
        """
        self._require_deterministic("Hessian")
        return self._following(
            HessianOperator(self._point(), self.batches, self.engine, self.memory_budget, self.group)
        )

    @one_at_a_time
    def gauss_newton(self) -> GaussNewtonOperator:
        """The generalised Gauss-Newton matrix of L, a copy at the time of the call, as for the Hessian.

        Of a loss that reads the parameters itself it has the Hessian with respect to them, too. Zero by definition for
        a loss that is linear in the outputs (``nll_loss``), which a warning says.
        """
        self._require_deterministic("Gauss-Newton")
        if self.loss_function.linear:
            warnings.warn(zero_gauss_newton(self.loss_function.name), RuntimeWarning, stacklevel=3)
        return self._following(
            GaussNewtonOperator(self._point(), self.batches, self.engine, self.memory_budget, self.group)
        )

    @one_at_a_time
    @torch.inference_mode(False)
    def empirical_fisher(self) -> EmpiricalFisherOperator:
        """The empirical Fisher matrix, N times the sum of the examples' gradient shares squared; a copy at the call.

        Raises
        ------
        ValueError
            If the model or the loss does not treat examples one by one.
        """
        self._require_deterministic("Fisher")
        parts = self._apart()
        options = (self.engine, self.memory_budget, self.group)
        operator = EmpiricalFisherOperator(self._point(), parts, *options, examples=self.num_examples)
        return self._following(operator, apart=True)

    def _apart(self) -> list[Batch]:
        """The batches, where the model and the loss treat examples one by one; tried on some of them."""
        some = [b.examples(spread(b.size, min(b.size, 64))) for b in self._given]
        first = without_graph(partial(self._point().outputs, some[0])) if some else torch.zeros(0, device="cpu")
        if cut(self._point(), some, 1) is None or not isinstance(first, Tensor) or first.is_complex():
            raise ValueError(
                "the empirical Fisher matrix needs a model and a loss that treat examples one by one, with outputs in "
                "one tensor with one row an example"
            )
        return self.batches

    @one_at_a_time
    def hessian_by_differences(self, step: float | None = None) -> DifferenceHessianOperator:
        """The Hessian by differences of gradients at a distance ``step``: for models without second derivatives."""
        self._require_deterministic()
        options = (self.memory_budget, self.group, step)
        return self._following(DifferenceHessianOperator(self._point(), self.batches, *options))

    @one_at_a_time
    def part(self, parameters: str | Sequence[str]) -> Objective:
        """The same loss as a function of some of the parameters, by name or pattern (``"head.*"``)."""
        other = copy.copy(self)
        other.function = self.function.restricted(untied(self.function, parameters))
        return other

    @one_at_a_time
    def layers(self, depth: int | None = None) -> dict[str, Objective]:
        """The same loss as a function of each layer's parameters: one :meth:`part` a module that has some of its own.

        ``depth``: one a block instead, the modules ``depth`` levels below the model. A tied weight belongs to the first
        module that holds it, and to no other.
        """
        groups: dict[str, list[str]] = {}
        for name in self.function.names:
            path = name.split(".")[:-1]
            groups.setdefault(".".join(path if depth is None else path[:depth]), []).append(name)
        return {block: self.part([glob.escape(name) for name in names]) for block, names in groups.items()}

    def _following(self, operator: Operator, apart: bool = False) -> Operator:
        """The operator, which a refresh gives this objective's loss and batches, weighed and cut, as they then are."""
        operator.source = self._present_apart if apart else self._present
        return operator

    def _present(self) -> tuple[Loss, list[Batch]]:
        return self.loss_function, self.batches

    def _present_apart(self) -> tuple[Loss, list[Batch]]:
        return self.loss_function, self._apart()

    def __copy__(self) -> Objective:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which has a copy of the model."""
        require_no_reference(self._loss, self.model, "objective")
        return {**vars(self), "_parts": None}

    def _point(self) -> Point:
        return Point.here(self.function, self.loss_function)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.function.device)

    def _within_memory(self, compute: Callable[[list[Batch]], Result]) -> Result:
        given = self.batches
        result, fitting = within_memory(compute, given, self._point)
        if fitting is not given:
            self._fitting = max(b.size for b in fitting)
            self._parts = self._cut_for(), fitting
        return result

    def _summed(self, value: Tensor) -> Tensor:
        if self.group is not None:
            torch.distributed.all_reduce(value, group=self.group)
        return value

    @torch.inference_mode(False)
    def _require_batches(self) -> None:
        """One example without a batch dimension has the layout of a batch of numbers: then fewer of them do not fit."""
        batch = next((b for b in self._given if b.size > 1 and could_be_one_example(b.inputs, b.targets)), None)
        if batch is None:
            return
        fewer = batch.examples(slice(0, batch.size - 1))
        try:
            found = without_graph(lambda: output_tensors(self._point().outputs(fewer)))
        except Exception as error:  # whatever the model raises on what it was not made for
            raise ValueError(one_example(batch.index, batch.inputs, batch.targets)) from error
        if any(t.ndim == 0 or len(t) != fewer.size for t in found):
            raise ValueError(one_example(batch.index, batch.inputs, batch.targets))

    @torch.inference_mode(False)
    def _require_deterministic(self, matrix: Matrix = None) -> None:
        """A product with a kept graph would hide that the model or the loss draws at random."""
        if not self._given:
            return
        require_deterministic_outputs(self._point(), self._given[0])
        if not self.loss_function.closed_form:
            self._within_memory(lambda batches: require_deterministic_loss(self._point(), batches[0]))
        compare_derivatives(self.function, self.loss_function, self._given[0], matrix)
