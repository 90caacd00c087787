"""The monitor as a callback of Lightning and of the Hugging Face Trainer, with the real packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from curvspace import Objective, eigsh
from curvspace.monitor import CSVSink

ABSENT = "is not installed: pip install 'curvspace[monitor]'"


def examples(n: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param, reason=f"{request.param} {ABSENT}")


def fit_lightning(pl: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    pl.seed_everything(0)
    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=12, shuffle=True)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = pl.loggers.CSVLogger(folder)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=logger, callbacks=callbacks, log_every_n_steps=1, **quiet, **options
    )
    trainer.fit(module, loader)
    return trainer, module


@pytest.mark.filterwarnings("ignore")
def test_lightning(pl, tmp_path):
    from curvspace.monitor import LightningMonitor

    callback = LightningMonitor(num_batches=2, num_classes=3, share=None, k=2, to=tmp_path / "c.csv")
    _, watched = fit_lightning(pl, tmp_path / "a", [callback])
    _, alone = fit_lightning(pl, tmp_path / "b", [])
    for a, b in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    table = pd.read_csv(tmp_path / "c.csv")
    assert table["step"].tolist() == list(range(2, 13))
    assert table.notna()[["sharpness", "f_top", "f_class", "class_angle_last_deg"]].all(axis=None)
    assert len(callback.monitor.batches) == 2
    objective = Objective(watched.train(), callback.monitor.batches)
    top = eigsh(objective.hessian(), k=1, tol=1e-5).values[0]
    assert table["sharpness"].iloc[-1] == pytest.approx(float(top), rel=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_to_the_trainers_loggers_and_counts_optimiser_steps(pl, tmp_path):
    from curvspace.monitor import LightningMonitor

    callback = LightningMonitor(batches=[examples()], share=None, module="net")
    trainer, _ = fit_lightning(pl, tmp_path, [callback], accumulate_grad_batches=2)
    logged = pd.read_csv(Path(trainer.logger.log_dir) / "metrics.csv")
    found = logged[logged["curvature/sharpness"].notna()]
    assert trainer.global_step == 6
    assert [row["step"] for row in callback.monitor.rows][-6:] == [1, 2, 3, 4, 5, 6]
    assert len(found) >= 6


@pytest.mark.filterwarnings("ignore")
def test_lightning_batches_of_another_form_are_refused_in_one_line(pl, tmp_path):
    from curvspace.monitor import LightningMonitor
    from curvspace.monitor.batches import FirstBatches

    with pytest.raises(ValueError, match=r"is a mapping with keys .*; pass unpack="):
        FirstBatches(1).add({"x": torch.zeros(2)})
    callback = LightningMonitor(num_batches=1, share=None, unpack=lambda batch: (batch[0], batch[1]))
    fit_lightning(pl, tmp_path, [callback])
    assert callback.monitor.rows


def transformer(labels: int = 3) -> Any:
    transformers = pytest.importorskip("transformers", reason=f"transformers {ABSENT}")
    torch.manual_seed(2)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=30, num_labels=labels, **size))


def sentences(n: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(n):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(1, 30, (8,), generator=generator)
        mask = (torch.arange(8) < length).long()
        labels = torch.randint(3, (), generator=generator)
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return rows


def fit_trainer(folder: Path, callbacks: list[Any], model: Any = None, data: Any = None, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason=f"transformers {ABSENT}")
    pytest.importorskip("accelerate", reason=f"accelerate {ABSENT}")
    model = model or transformer()
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=8, seed=0, use_cpu=True, **quiet, **options
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data or sentences(), callbacks=callbacks)
    trainer.train()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 3}, {"loss": "cross_entropy", "parameters": "classifier.*"}], ids=str
)
def test_hugging_face_trainer(tmp_path, options):
    transformer()  # skips where the package is absent
    from curvspace.monitor import TrainerMonitor

    callback = TrainerMonitor(num_batches=2, share=None, k=2, to=tmp_path / "c.csv", **options)
    watched = fit_trainer(tmp_path / "a", [callback])
    assert same(watched, fit_trainer(tmp_path / "b", []))
    assert not watched._forward_pre_hooks
    table = pd.read_csv(tmp_path / "c.csv")
    assert table["step"].tolist() == [2, 3, 4, 5, 6]
    assert table[["sharpness", "f_top"]].notna().all(axis=None)
    assert ("f_class" in table) == ("num_classes" in options)

    watched.eval()
    parts = callback._first.pairs
    with torch.no_grad():
        losses = [watched(**x).loss if not options else watched(**x, labels=y).loss for x, y in parts]
    assert table["loss"].iloc[-1] == pytest.approx(float(sum(losses) / 2), rel=1e-5)


def test_a_language_models_own_loss_over_tokens_with_accumulation(tmp_path):
    transformers = pytest.importorskip("transformers", reason=f"transformers {ABSENT}")
    from curvspace.monitor import TrainerMonitor

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2))
    rows = [{**row, "labels": torch.where(row["attention_mask"] > 0, row["input_ids"], -100)} for row in sentences(64)]
    callback = TrainerMonitor(num_batches=1, share=None, k=1)
    fit_trainer(tmp_path, [callback], model, rows, gradient_accumulation_steps=2)
    assert [row["step"] for row in callback.monitor.rows] == [1, 2, 3, 4, 5, 6]
    ((inputs, _),) = callback._first.pairs
    assert "num_items_in_batch" not in inputs
    with torch.no_grad():
        mean = model.eval()(**inputs).loss
    assert callback.monitor.rows[-1]["loss"] == pytest.approx(float(mean), rel=1e-5)


def test_what_the_trainer_monitor_refuses():
    transformer()
    from curvspace.monitor import TrainerMonitor

    with pytest.raises(ValueError, match="batches= needs loss="):
        TrainerMonitor(batches=[])
    callback = TrainerMonitor(num_batches=1)
    inputs = {name: torch.stack([row[name] for row in sentences(4)]) for name in ("input_ids", "attention_mask")}
    callback._first.add(inputs)
    with pytest.raises(ValueError, match="the model returned no loss: give it labels"):
        callback._begin(transformer())(0)


def test_sinks_shared_by_path_are_made_at_once(tmp_path):
    transformer()
    from curvspace.monitor import TrainerMonitor

    (tmp_path / "c.csv").write_text("step\n1\n")
    with pytest.raises(ValueError, match="is there already"):
        TrainerMonitor(to=tmp_path / "c.csv")
    assert TrainerMonitor(to=CSVSink(tmp_path / "c.csv", append=True))


@pytest.mark.filterwarnings("ignore")
def test_lightnings_callback_refuses_another_network(pl, tmp_path):
    from curvspace.monitor import LightningMonitor

    callback = LightningMonitor(num_batches=1, share=None, k=1, to=[])
    trainer, module = fit_lightning(pl, tmp_path, [callback])
    rows = len(callback.monitor.rows)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=12))
    assert len(callback.monitor.rows) == rows + 4
    with pytest.raises(ValueError, match="follows another network already; make a new one for each training"):
        fit_lightning(pl, tmp_path, [callback])


def test_the_trainers_callback_refuses_another_network_and_catches_each_batch_once(tmp_path):
    model = transformer()
    from curvspace.monitor import TrainerMonitor

    callback = TrainerMonitor(num_batches=2, share=None, k=1)
    with pytest.raises(KeyError):  # the first training ends in an error of its own
        fit_trainer(tmp_path, [callback], model, [{**sentences(1)[0], "labels": None}, {}])
    fit_trainer(tmp_path, [callback], model)
    (first, _), (second, _) = callback._first.pairs
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="follows another network already; make a new one for each training"):
        fit_trainer(tmp_path, [callback], transformer())
