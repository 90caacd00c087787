"""The ledger of reference results: a piece is a folder, and of several the one of the largest scale decides."""

from __future__ import annotations

import re
import shlex
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from workflow import reference, settings, specs

CONFIG = """
scale: {scale}
device: cpu
studies: {{a: {{enabled: false}}, c: {{enabled: false}}, d: {{enabled: false}}, race: {{enabled: false}}, \
tournament: {{enabled: false}}, b: {{}}}}
"""


def piece(folder: Path, name: str, scale: str, value: float) -> None:
    """A run whose sums of squared shares (claim B15) all are 0.01 at step 50 but for the first ten, ``value``."""
    (folder / name / "tables").mkdir(parents=True)
    (folder / name / "config.yaml").write_text(CONFIG.format(scale=scale))
    table = pd.DataFrame(
        {
            "step": [50],
            "sum": ["1..k"],
            "paper": [0.93],
            "value": [value],
            "model": ["fc-100x100"],
            "parameters": [89_610],
        }
    )
    table.to_csv(folder / name / "tables" / "B-T3.csv", index=False)


def verdict(folder: Path, claim: str = "B15") -> pd.Series:
    reference.main(["--folder", str(folder)])
    return pd.read_csv(folder / "claims.csv", keep_default_na=False).set_index("id").loc[claim]


def test_a_piece_is_a_folder_and_the_largest_scale_decides(tmp_path: Path) -> None:
    piece(tmp_path, "small", "default", 0.5)
    small = verdict(tmp_path)
    assert (small["verdict"], small["piece"]) == ("fails", "small")
    assert "10,000 examples of MNIST" in small["scale"]
    assert "89,600 parameters" in small["scale"]
    piece(tmp_path, "a-large-one", "paper", 0.93)
    large = verdict(tmp_path)
    assert (large["verdict"], large["piece"]) == ("holds", "a-large-one")
    assert "a-large-one" in (tmp_path / "claims.md").read_text()


def test_a_piece_that_ran_some_of_the_networks_gives_no_verdict_on_all(tmp_path: Path) -> None:
    piece(tmp_path, "part", "paper", 0.93)
    means = pd.DataFrame({"dataset": "mnist-60k", "model": "fc-100x100", "seed": 0, "dimension": range(2, 21)})
    (tmp_path / "part" / "figures").mkdir()
    means.assign(value=[1 - 0.05 * max(0, d - 9) for d in range(2, 21)]).to_csv(tmp_path / "part/figures/B-F3.csv")
    found = verdict(tmp_path, "B12")
    assert found["verdict"] == "not tested at this scale"
    assert "no ResNet-18" in found["needs"]
    assert "ResNet-18" not in found["scale"]


def test_the_examples_of_a_network_that_did_not_run_are_not_in_the_scale(tmp_path: Path) -> None:
    """Paper B's scale: all of MNIST for the fully connected network, 5,000 examples for ResNet-18 alone."""
    piece(tmp_path, "part", "paper", 0.93)
    shares = pd.DataFrame({"dataset": "mnist-60k", "model": "fc-100x100", "seed": 0, "step": range(4), "value": 0.9})
    (tmp_path / "part" / "figures").mkdir()
    shares.assign(quantity="f_top").to_csv(tmp_path / "part/figures/B-F1.csv")
    found = verdict(tmp_path, "B1")
    assert (found["verdict"], found["measured"]) == ("not tested at this scale", "0.9 [0.87, 0.93]")
    assert found["scale"] == "fully connected network on MNIST, 5 epochs, η = 0.1"


def race_piece(folder: Path, name: str) -> list[tuple[str, str]]:
    """An empty piece with the race's config; the data set and model of each of its workloads."""
    (folder / name / "figures").mkdir(parents=True)
    given = (ROOT / "results/reference/race/config.yaml").read_text("utf-8")
    (folder / name / "config.yaml").write_text(given, "utf-8")
    return [(w["dataset"], w["model"]) for w in reference.whole(folder / name)["studies"]["race"]["workloads"]]


def raced(piece: Path, high: float, workloads: list[tuple[str, str]], every: list[tuple[str, str]]) -> None:
    """Claim X9's speed-up of a random span on some workloads, with ``high`` as its upper bound."""
    measured = {"against": "nesterov", "speed_up": high - 0.01, "low": high - 0.02, "high": high, "seeds": 5}
    rows = [{"optimizer": "random-span-filtered", **measured, "dataset": d, "model": m} for d, m in workloads]
    rows += [{"optimizer": "adamw", **measured, "dataset": d, "model": m} for d, m in every]
    pd.DataFrame(rows).to_csv(piece / "figures" / "X-R2.csv")


def test_of_equal_scales_the_piece_with_more_of_the_claims_networks_decides(tmp_path: Path) -> None:
    every = race_piece(tmp_path, "a-part")
    race_piece(tmp_path, "b-whole")
    raced(tmp_path / "a-part", 1.5, every[:2], every)
    raced(tmp_path / "b-whole", 1.4, every, every)
    found = verdict(tmp_path, "X9")
    assert (found["verdict"], found["piece"]) == ("fails", "b-whole")


def test_a_race_on_some_of_its_workloads_does_not_hold_on_every_one(tmp_path: Path) -> None:
    every = race_piece(tmp_path, "race")
    ran = [pair for pair in every if pair[1] != "resnet9-w8"]

    def judged(high: float, workloads: list[tuple[str, str]]) -> pd.Series:
        raced(tmp_path / "race", high, workloads, every)
        return verdict(tmp_path, "X9")

    part = judged(1.01, ran)
    assert part["verdict"] == "not tested at this scale"
    assert "(here: no ResNet9 of width 8 on 10,000 examples of CIFAR-10, 4 epochs)" in part["needs"]
    assert "ResNet9" not in part["scale"]
    assert "CNN-400 on 50,000 examples of MNIST" in part["scale"]
    assert judged(1.06, ran)["verdict"] == "inconclusive"
    whole = judged(1.01, every)
    assert whole["verdict"] == "holds"
    assert "ResNet9" in whole["scale"]


def test_a_tables_row_is_judged_at_the_scale_of_that_row(tmp_path: Path) -> None:
    piece(tmp_path, "part", "paper", 0.93)
    row = {"case": "FC, softplus", "model": "fc-100x100-softplus", "overlap": 0.93, "paper": 0.96, "parameters": 89_610}
    pd.DataFrame([row, {**row, "case": "FC, regression", "parameters": 7}]).to_csv(tmp_path / "part/tables/B-T1.csv")
    found = verdict(tmp_path, "B3")
    assert (found["verdict"], found["measured"]) == ("holds", "0.93 [0.92, 0.94] (paper 0.96)")
    assert found["scale"] == "fully connected network on MNIST, 5 epochs, η = 0.1; 89,600 parameters"
    assert verdict(tmp_path, "B7")["measured"] == "no row with case ConvNet, random labels"


def test_the_default_runs_verdict_stands_beside_that_of_a_larger_piece(tmp_path: Path) -> None:
    piece(tmp_path, "default", "default", 0.5)
    alone = verdict(tmp_path)
    assert (alone["verdict"], alone["piece"], alone["default"]) == ("fails", "default", "")
    piece(tmp_path, "large", "paper", 0.93)
    both = verdict(tmp_path)
    assert (both["verdict"], both["piece"], both["default"]) == ("holds", "large", "fails")


def test_a_claim_without_a_piece_says_so(tmp_path: Path) -> None:
    piece(tmp_path, "small", "default", 0.93)
    untested = verdict(tmp_path, "D1")
    assert (untested["verdict"], untested["default"], untested["piece"]) == ("not tested at this scale", "", "")
    assert untested["measured"] == "no reference piece has its tables"


def test_a_narrower_network_of_the_same_kind_decides_a_phenomenon_and_its_width_stands_there(tmp_path: Path) -> None:
    piece(tmp_path, "small", "default", 0.93)
    (tmp_path / "small" / "figures").mkdir()
    runs = [("mnist-10k", "fc-100x100"), ("cifar10-5k-16px", "resnet18-narrow")]
    pd.concat(
        pd.DataFrame({"dataset": data, "model": model, "seed": seed, "dimension": range(2, 21)}).assign(
            value=[1 - 0.05 * max(0, d - 9) for d in range(2, 21)]
        )
        for data, model in runs
        for seed in (0, 1)
    ).to_csv(tmp_path / "small/figures/B-F3.csv")
    found = verdict(tmp_path, "B12")
    assert found["verdict"] == "holds"
    assert "ResNet-18 of width 6 on 5,000 examples of CIFAR-10 at 16 × 16 pixels" in found["scale"]


def test_a_config_that_cannot_be_read_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    piece(tmp_path, "small", "no-such-scale", 0.93)
    with pytest.raises(SystemExit):
        verdict(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1


def commands() -> list[tuple[str, str]]:
    """(piece, command) for each command that a piece of the reference results, or the page about them, gives."""
    found = []
    for readme in sorted((ROOT / "results" / "reference").glob("*/README.md")):
        text = readme.read_text("utf-8").replace("\\\n", " ")
        found += [(readme.parent.name, line.strip()) for line in text.splitlines() if line.startswith("    snakemake ")]
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \|[^|]+\| `([^`]+)`", page, re.M)
    assert len(rows) > 15
    return found + [(row, re.sub("^C ", "--config scale=reference ", command)) for row, command in rows]


def braces(word: str) -> list[str]:
    """``a{1,2}.png`` as a shell would write it out."""
    head, opened, rest = word.partition("{")
    if not opened:
        return [word]
    middle, _, tail = rest.partition("}")
    return [head + part + end for part in middle.split(",") for end in braces(tail)]


def asked(command: str) -> tuple[dict[str, Any], list[str]]:
    """The config and the targets of a command; words in capitals stand for any name."""
    options, _, targets = command.partition(" -- ")
    words = shlex.split(options)
    files = [ROOT / words[i + 1] for i, word in enumerate(words) if word == "--configfile"]
    given = [word.split("=", 1) for word in words if "=" in word]
    values = {key: yaml.safe_load(value) for key, value in given}
    patterns = [re.sub(r"[A-Z]{5,}", "*", target) for word in targets.split() for target in braces(word)]
    return settings.whole({**settings.files([ROOT / "config.yaml", *files]), **values}), patterns


@pytest.mark.usefixtures("code_read_once")
@pytest.mark.parametrize(("name", "command"), commands())
def test_the_command_of_a_piece_still_plans_what_it_says(name: str, command: str) -> None:
    config, targets = asked(command)
    for rivals in ("pytorch_optimizer", "schedulefree"):  # the extra `rivals`
        if f"{rivals}:" in str(config["optimizers"]):
            pytest.importorskip(rivals)
    plan = specs.load(config, ROOT)
    made = [job.record.removesuffix(".run.json") for job in plan.jobs()]
    for target in targets:
        assert matching(made, target.rpartition(".")[0]), f"{name}: nothing makes {target}"
