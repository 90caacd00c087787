"""The monitor as a callback of the Hugging Face Trainer (the package ``transformers``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from curvspace.inputs import Inputs
from curvspace.losses import Loss
from curvspace.monitor.batches import FirstBatches, own_loss, unpacked, with_labels
from curvspace.monitor.follow import CurvatureMonitor
from curvspace.monitor.sinks import Sink, as_sinks


class TrainerMonitor(TrainerCallback):
    """``Trainer(callbacks=[TrainerMonitor(to=...)])``: a :class:`CurvatureMonitor` called at each training step.

    Only the first process of several measures. A callback follows one network; another one takes another callback.

    Parameters
    ----------
    loss
        Of the model's logits and ``labels``, as for the objective. Default: the loss that the model itself returns;
        with ``num_classes``, cross-entropy.
    batches
        What to measure on, as (inputs, labels). Default: what the model is called with in the first ``num_batches``
        training steps; a hook on the model catches it and is then removed.
    to
        As for the monitor.
    options
        Further options of :class:`~curvspace.monitor.follow.CurvatureMonitor`.

    Attributes
    ----------
    monitor : the :class:`CurvatureMonitor`, None until it has its batches
    """

    def __init__(
        self,
        loss: str | Loss | Callable[..., Tensor] | None = None,
        *,
        batches: Iterable[tuple[Inputs, Tensor]] | None = None,
        num_batches: int = 4,
        to: str | os.PathLike[str] | Sink | list[Any] | None = None,
        **options: Any,
    ):
        self.monitor: CurvatureMonitor | None = None
        own = loss is None and options.get("num_classes") is None
        if own and batches is not None:
            raise ValueError("batches= needs loss=, a function of the model's logits and the labels")
        self._loss: Any = own_loss if own else loss or "cross_entropy"
        self._batches = None if batches is None else list(batches)
        self._first = FirstBatches(num_batches, with_labels if own else unpacked)
        self._sinks: list[Sink] = as_sinks(to)
        self._options = options
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._unhook()  # of a training that ended in an exception
        if self.monitor is not None:
            self.monitor.require(kwargs["model"])
        if state.is_world_process_zero and self._batches is None and not self._first.complete:
            self._hook = kwargs["model"].register_forward_pre_hook(self._catch, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.monitor is None:
            if self._batches is None and not self._first.complete:
                return
            self._unhook()
            self.monitor = self._begin(kwargs["model"])
        self.monitor(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._unhook()
        if self.monitor is not None:
            self.monitor.close()

    def _begin(self, model: nn.Module) -> CurvatureMonitor:
        batches = self._first.pairs if self._batches is None else self._batches
        return CurvatureMonitor(model, batches, self._loss, to=self._sinks, **self._options)

    def _catch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            # the count of an accumulated batch would scale the loss of its first part
            self._first.add({name: value for name, value in kwargs.items() if name != "num_items_in_batch"})

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
