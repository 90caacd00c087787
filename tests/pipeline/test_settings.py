"""The config from what the user wrote: scales, studies with scales of their own, and what contradicts itself."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
import yaml

import papers
from curvspace.errors import UserError
from papers import registry
from workflow import settings as workflow_settings
from workflow.settings import files, laid_over
from workflow.spec_files import canonical
from workflow.specs import Plan, load

ROOT = Path(__file__).parents[2]


def test_the_users_values_are_laid_over_the_settings_of_the_scale():
    whole = laid_over({"scale": "smoke", "studies": {"b": {"seed": 7}}, "datasets": {"digits": {"train": 30}}})
    assert whole["studies"]["b"]["seed"] == 7
    assert whole["studies"]["b"]["tol"] == 0.01  # smoke
    assert whole["studies"]["b"]["k"] == 20  # the default, which smoke is laid over
    assert whole["datasets"]["digits"] == {"source": "digits", "train": 30, "validation": 400}
    assert "rmsprop" not in whole["optimizers"]  # paper D's alone


def test_a_whole_config_stays_as_it_is():
    whole = laid_over(files([ROOT / "config.yaml"]))
    assert laid_over(whole) == whole


def test_studies_are_a_list_or_have_scales_of_their_own():
    assert list(laid_over({"studies": ["d", "a"]})["studies"]) == ["d", "a"]
    mixed = laid_over({"studies": {"a": "smoke", "d": None}})
    assert {name: block["scale"] for name, block in mixed["studies"].items()} == {"a": "smoke", "d": "default"}
    assert mixed["studies"]["d"] == laid_over({"studies": ["d"]})["studies"]["d"]
    assert mixed["studies"]["a"] == laid_over({"scale": "smoke", "studies": ["a"]})["studies"]["a"]


def test_what_two_names_share_in_a_file_is_changed_for_one_alone():
    whole = laid_over({"studies": ["b"], "tasks": {"mnist-10k/softmax": {"epochs": 1}}})
    assert whole["tasks"]["mnist-10k/softmax"]["epochs"] == 1
    assert whole["tasks"]["mnist-10k/fc-100x100"]["epochs"] == 8


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"scale": "huge", "studies": ["a"]},
            r"scale = 'huge' is not allowed; allowed: default, paper, ref",
        ),
        ({"studies": {"a": "tiny"}}, r"studies\.a = 'tiny' is not allowed; allowed: default, paper, reference, smoke"),
        ({"studies": {"a": 3}}, r"studies\.a = 3 is not allowed"),
        ({"studies": 3}, r"studies = 3 is not allowed"),
        ({"scale": [1], "studies": ["a"]}, r"scale = \[1\] is not allowed"),
    ],
)
def test_a_wrong_scale_or_study_is_one_line(config, said):
    with pytest.raises(UserError, match=said):
        laid_over(config)


def test_one_name_with_two_values_is_an_error(tmp_path, monkeypatch):
    for name, epochs in (("one", 1), ("two", 2)):
        (tmp_path / name / "settings").mkdir(parents=True)
        (tmp_path / name / "study.py").touch()
        content = {"tasks": {"x/y": {"epochs": epochs}, "x/z": {"epochs": 3}}}
        (tmp_path / name / "settings" / "default.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(tmp_path)])
    assert {"one", "two", "a"} <= set(registry.folders())
    with pytest.raises(
        UserError, match=r"tasks\.x/y is one thing in study one at scale default and another in study two"
    ):
        laid_over({"studies": ["one", "two"]})
    with pytest.raises(UserError, match="study one has no settings at scale 'smoke'"):
        laid_over({"studies": {"one": "smoke"}})


@pytest.mark.usefixtures("code_read_once")
@pytest.mark.parametrize("scale", sorted(registry.scales()))
@pytest.mark.parametrize("name", registry.folders())
def test_every_study_alone_plans_at_every_scale(name, scale):
    plan = load(laid_over({**files([ROOT / "config.yaml"]), "scale": scale, "studies": {name: {}}}), ROOT)
    assert len(list(plan.jobs())) > 10


def test_studies_at_any_scales_are_laid_beside_each_other(monkeypatch):
    monkeypatch.setattr(workflow_settings, "at_scale", cache(workflow_settings.at_scale))
    for (one, scale), (other, its) in combinations(product(registry.folders(), sorted(registry.scales())), 2):
        if one != other:
            assert set(laid_over({"studies": {one: scale, other: its}})["studies"]) == {one, other}


def test_a_config_that_is_written_out_and_read_again_has_the_same_front_page() -> None:
    config = workflow_settings.whole(workflow_settings.files([ROOT / "config.yaml"]))
    again = json.loads(canonical(config))
    assert Plan(config, ROOT).front == Plan(again, ROOT).front
