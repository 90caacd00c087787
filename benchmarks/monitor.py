"""What following curvature costs a training, on three frameworks: ``python -m benchmarks.monitor [SECONDS [NAME...]]``.

Each training runs for the same number of steps without and with the monitor in one process. Two numbers
come out: the overhead as the monitor itself measures it (its seconds per second of training), and from outside the
processor time of the whole training with it over that without it, less one.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import nn

from curvspace.models.registry import build
from curvspace.monitor import CurvatureMonitor, LightningMonitor, TrainerMonitor

OPTIONS: dict[str, Any] = {"k": 3, "num_classes": 10}
"""Measured on one minibatch of the training in each framework."""


def examples(n: int = 2048) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (n,), generator=generator)
    patterns = torch.randn(10, 64, generator=generator)
    return torch.utils.data.TensorDataset(patterns[targets] + torch.randn(n, 64, generator=generator), targets)


def network() -> nn.Module:
    return build("fc", {"widths": [100, 100]}, (64,), 10)


def plain(steps: int, share: float | None) -> Any:
    """Two hidden layers of 100 by SGD, minibatches of 64."""
    torch.manual_seed(0)
    model = network()
    data = examples()
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = CurvatureMonitor(model, [data[:64]], share=share, **OPTIONS) if share else None
    step = 0
    while step < steps:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
            if monitor:
                monitor(step)
    return monitor


def lightning(steps: int, share: float | None) -> Any:
    """The same by Lightning."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    callback = LightningMonitor(num_batches=1, share=share, **OPTIONS) if share else None
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    loader = torch.utils.data.DataLoader(examples(), batch_size=64, shuffle=True)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[callback] if callback else [], **quiet
    )
    trainer.fit(Module(), loader)
    return callback and callback.monitor


def trainer(steps: int, share: float | None) -> Any:
    """A BERT of one layer by the Hugging Face Trainer, minibatches of 16 × 16 tokens."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=1000, num_labels=10, max_position_embeddings=64, **size)
    model = transformers.BertForSequenceClassification(config)
    tokens, labels = torch.randint(1, 1000, (1024, 16)), torch.randint(10, (1024,))
    data = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": y} for t, y in zip(tokens, labels)]  # noqa: B905
    callback = TrainerMonitor(num_batches=1, share=share, **OPTIONS) if share else None
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=16, **quiet)
        callbacks = [callback] if callback else []
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return callback and callback.monitor


def timed(train: Callable[[int, float | None], Any], steps: int, share: float | None) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    monitor = train(steps, share)
    return time.perf_counter() - wall, time.process_time() - cpu, monitor


def row(train: Callable[[int, float | None], Any], seconds: float, share: float) -> dict[str, Any]:
    """A training of about so many seconds of processor time, without and with the monitor."""
    timed(train, 10, None)
    few, some = timed(train, 50, None)[1], timed(train, 150, None)[1]
    steps = max(50, round(100 * seconds / max(some - few, 1e-3)))
    _, without, _ = timed(train, steps, None)
    wall, with_it, monitor = timed(train, steps, share)
    return {
        "framework": train.__name__,
        "steps": steps,
        "share": share,
        "measurements": len(monitor.rows),
        "own_overhead": monitor.overhead,
        "cpu_overhead": with_it / without - 1,
        "training_cpu_s": without,
        "wall_s": wall,
        "last_measure_s": monitor.rows[-1]["measure_s"] if monitor.rows else float("nan"),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    wanted = sys.argv[2:] or ["plain", "lightning", "trainer"]
    table = pd.DataFrame(
        [row(train, seconds, 0.05) for train in (plain, lightning, trainer) if train.__name__ in wanted]
    )
    print(table.to_markdown(index=False, floatfmt=".3g"))
