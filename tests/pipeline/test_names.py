"""Names and paths of a config: none reaches a shell, a wildcard or a folder above as anything but itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from papers.common.study import NAME, Artefact, Measure, Run, StudyError
from workflow import checks, settings

ROOT = Path(__file__).parents[2]
CONFIG = settings.whole(settings.files([ROOT / "config.yaml"]))
BAD = [
    *(
        "x; touch F #",
        "x && touch F",
        "x | touch F",
        "x & touch F",
        "`touch F`",
        "$(touch F)",
        "x > F",
        "< F",
        "x\ntouch F",
    ),
    *(
        "$HOME",
        "${HOME}",
        "~",
        "~root",
        "*",
        "?",
        "[a]",
        "{}",
        "{x}",
        "{{x}}",
        "{wildcards.model}",
        "!!",
        "!x",
        "%s",
        "^x",
    ),
    *(
        "'",
        '"',
        "a'b",
        'a"b',
        "\\",
        "a\\nb",
        "a b",
        " a",
        "a ",
        "a\t",
        "a\r",
        "a\x00",
        "é",
        "а",
        "-x",
        "--out",
        ".",
        "..",
    ),
    *("../x", "a/b", "/etc", "a//b", ".hidden", "", "#x", "a:b", "a,b", "a=b", "@x", "(x)", "a\n"),
]
GOOD = ["x", "sgd", "fc-100x100", "bs64.2", "a_b", "mnist+noise", "0", "a..b", "Adam"]
BLOCKS = {"optimizers": {"kind": "sgd"}, "models": {"kind": "cnn-400"}, "datasets": {"source": "digits"}}
PATHS = ["~/x", "$HOME/x", "{x}", "a{b}", "a*", "a?", "[a]", "-x", "a\nb", "`x`", "a'b", 'a"b', "a\\b", ""]


@pytest.mark.parametrize("section", BLOCKS)
@pytest.mark.parametrize("name", BAD)
def test_a_name_that_means_something_else_is_refused_in_one_line(section, name):
    lines = checks.problems({**CONFIG, section: {**CONFIG[section], name: BLOCKS[section]}})
    assert len(lines) == 1
    assert section in lines[0]
    assert "is not a name of the right form" in lines[0]
    assert len(lines[0].splitlines()) == 1


@pytest.mark.parametrize("name", BAD)
def test_no_study_can_declare_such_a_name(name):
    for make in (
        lambda: Run(name, "m", "o", 1, 0.1, 0),
        lambda: Run("d", name, "o", 1, 0.1, 0),
        lambda: Run("d", "m", name, 1, 0.1, 0),
        lambda: Artefact(name, "figure", "m:f", {}),
    ):
        with pytest.raises(StudyError, match="is no name"):
            make()
    if name != "a/b":  # a measure's name may have folders
        with pytest.raises(StudyError, match="is no name"):
            Measure(name, "m:f")


@pytest.mark.parametrize("name", GOOD)
def test_names_that_are_names_are_taken(name):
    for section, block in BLOCKS.items():
        assert checks.problems({**CONFIG, section: {**CONFIG[section], name: block}}) == []
    assert Run(name, name, name, "full", 0.1, 0).path
    assert Measure(f"{name}/{name}", "m:f").path


@pytest.mark.parametrize("path", PATHS)
def test_a_results_folder_that_means_something_else_is_refused(path):
    lines = checks.problems({**CONFIG, "results": path})
    assert len(lines) == 1
    assert lines[0].startswith("results = ")


def test_a_results_folder_may_have_spaces_and_any_letters():
    for path in ("my results", "/tmp/é/x; y & z", "../elsewhere", "results/paper"):
        assert checks.problems({**CONFIG, "results": path}) == []


def test_the_schema_and_the_studies_have_one_pattern():
    assert checks.schema()["$defs"]["name"]["pattern"] == f"^{NAME}\\Z"
    assert checks.schema()["properties"]["tasks"]["propertyNames"]["pattern"] == f"^{NAME}/{NAME}\\Z"
    assert all(re.fullmatch(NAME, name) for name in GOOD)
