"""The monitor as a callback of Lightning (the package ``lightning`` or ``pytorch_lightning``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from curvspace.inputs import Inputs
from curvspace.losses import Loss
from curvspace.monitor.batches import FirstBatches, Pair, unpacked
from curvspace.monitor.follow import CurvatureMonitor
from curvspace.monitor.sinks import Row, Sink, as_sinks

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback


class LightningMonitor(Callback):
    """``Trainer(callbacks=[LightningMonitor(...)])``: a :class:`CurvatureMonitor` that is called at each training step.

    Only the first process of several measures. A callback follows one network; another one takes another callback.

    Parameters
    ----------
    loss
        Of ``module(inputs)`` and targets, as for the objective; ``training_step`` itself is not called, since it logs.
    batches
        What to measure on. Default: the first ``num_batches`` of the training, in the callback's first steps.
    unpack
        function(batch) -> (inputs, targets). Default: a pair, or a mapping with ``labels``.
    module
        Name of the attribute that holds the network, where the ``LightningModule`` has no ``forward`` of its own.
    to
        As for the monitor. Default: the trainer's own loggers.
    options
        Further options of :class:`~curvspace.monitor.follow.CurvatureMonitor`.

    Attributes
    ----------
    monitor : the :class:`CurvatureMonitor`, None until it has its batches
    """

    def __init__(
        self,
        loss: str | Loss | Callable[..., Tensor] = "cross_entropy",
        *,
        batches: Iterable[tuple[Inputs, Tensor]] | None = None,
        num_batches: int = 4,
        unpack: Callable[[Any], Pair] = unpacked,
        module: str | None = None,
        to: str | os.PathLike[str] | Sink | list[Any] | None = None,
        **options: Any,
    ):
        self.monitor: CurvatureMonitor | None = None
        self._batches = None if batches is None else list(batches)
        self._first = FirstBatches(num_batches, unpack)
        self._module, self._loss, self._options = module, loss, options
        self._sinks: list[Sink] = as_sinks(to)
        self._step = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None:
            self.monitor.require(self._followed(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        if self.monitor is None:
            if self._batches is None:
                self._first.add(batch)
                if not self._first.complete:
                    return
            self.monitor = self._begin(trainer, pl_module)
        if trainer.global_step != self._step:  # else the gradients are still being accumulated
            self._step = trainer.global_step
            self.monitor(self._step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)

    def _begin(self, trainer: Any, pl_module: Any) -> CurvatureMonitor:
        batches = self._first.pairs if self._batches is None else self._batches
        sinks = self._sinks or [_Loggers(trainer)]
        return CurvatureMonitor(self._followed(pl_module), batches, self._loss, to=sinks, **self._options)

    def _followed(self, pl_module: Any) -> nn.Module:
        return getattr(pl_module, self._module) if self._module else pl_module


class _Loggers:
    """The loggers of a trainer as a sink."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def write(self, row: Row) -> None:
        metrics = {f"curvature/{name}": value for name, value in row.items() if name != "step" and value == value}
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=int(row["step"]))

    def close(self) -> None:
        pass
