"""The commands of figures, tables, measures and verification, run on small made-up tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from curvspace.cli.common import json_object, load_function
from papers.cli import figure, measure, table
from papers.common import tables
from papers.common.style import Style

HERE = "test_commands"


def draw(tables, style, log=False):
    picture, axes = style.panels(1, 2, sharex=True)
    drawn = style.band(axes[0, 0], tables["a"], "step", "loss", label="a")
    axes[0, 1].plot(drawn["step"], drawn["median"], color=style.colours(["a"])["a"])
    if log:
        axes[0, 0].set_yscale("log")
    return picture, drawn


def not_a_figure(tables, style):
    return tables["a"]


def best(tables):
    return tables["a"].rename(columns={"loss": "a_b & c"}).assign(name="x|y", missing=np.nan)


def count(context, scale):
    return pd.DataFrame({"runs": [len(context.runs) * scale]})


def no_table(context):
    return [1]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = {"step": [0, 1, 0, 1], "loss": [2.0, 1.0, 3.0, 1.23456789], "seed": [0, 0, 1, 1]}
    for name in ("one", "two"):
        (tmp_path / "measures").mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(tmp_path / "measures" / f"{name}.csv", index=False)
    return tmp_path


def spec(**values: Any) -> str:
    return json.dumps({"inputs": {"a": ["measures/one.csv"]}, **values})


def test_a_figure_is_the_same_bytes_when_drawn_again(results):
    for name in ("first", "second"):
        arguments = ["--spec", spec(function=f"{HERE}:draw", options={"log": True}), "--code", "c0de"]
        figure.main([*arguments, "--results", str(results), "--out", str(results / "figures" / f"{name}.csv")])
    for suffix in (".png", ".pdf", ".csv"):
        first, second = ((results / "figures" / f"{n}{suffix}").read_bytes() for n in ("first", "second"))
        assert first == second
        assert first
    record = json.loads((results / "figures" / "first.run.json").read_text())
    assert record["code"] == "c0de"
    assert record["job"]["options"] == {"log": True}
    assert {"python", "torch", "matplotlib"} <= set(record["versions"])
    drawn = pd.read_csv(results / "figures" / "first.csv")
    assert drawn["median"].tolist() == [2.5, (1.0 + 1.23456789) / 2]


def test_a_table_in_four_forms(results):
    out = results / "tables" / "T.csv"
    table.main(
        ["--spec", spec(function=f"{HERE}:best", title="Best & last"), "--results", str(results), "--out", str(out)]
    )
    assert pd.read_csv(out)["a_b & c"].tolist() == [2.0, 1.0, 3.0, 1.23456789]
    markdown = out.with_suffix(".md").read_text()
    assert "| 1 | 1.235 | 1 | x\\|y |  |" in markdown
    latex = out.with_suffix(".tex").read_text()
    assert r"step & a\_b \& c & seed & name & missing \\" in latex
    assert latex.count(r"\\") == 5
    page = out.with_suffix(".html").read_text()
    assert "<h2>Best &amp; last</h2>" in page
    assert '<td class="n">1.235</td>' in page


def test_tables_of_one_label_are_concatenated(results):
    read = tables.read(results, {"a": ["measures/one.csv", "measures/two.csv"], "b": ["measures/two.csv"]})
    assert len(read["a"]) == 8
    assert len(read["b"]) == 4


def test_a_measure_writes_its_table_and_its_record(tmp_path):
    out = tmp_path / "m" / "fc0.1-x.csv"
    text = json.dumps({"function": f"{HERE}:count", "options": {"scale": 2}, "runs": []})
    measure.main(["--spec", text, "--results", str(tmp_path), "--out", str(out), "--threads", "1"])
    assert pd.read_csv(out)["runs"].tolist() == [0]
    assert json.loads((tmp_path / "m" / "fc0.1-x.run.json").read_text())["device"].startswith("cpu")


@pytest.mark.parametrize("name", ["one.csv", "one.run.json"])
@pytest.mark.parametrize("how", ["a bit", "a line", "empty"])
def test_a_table_that_was_altered_is_not_drawn(tmp_path, capsys, name, how):
    out = tmp_path / "measures" / "one.csv"
    text = json.dumps({"function": f"{HERE}:count", "options": {"scale": 2}, "runs": []})
    measure.main(["--spec", text, "--results", str(tmp_path), "--out", str(out)])
    assert tables.read(tmp_path, {"a": ["measures/one.csv"]})["a"]["runs"].tolist() == [0]
    file = tmp_path / "measures" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 2
    file.write_bytes({"a bit": bytes(content), "a line": file.read_bytes() + b"2\n", "empty": b""}[how])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        table.main(
            ["--spec", spec(function=f"{HERE}:best"), "--results", str(tmp_path), "--out", str(tmp_path / "T.csv")]
        )
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert name in line
    assert "again" in line


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        (figure, {"function": f"{HERE}:absent"}, "has no function absent"),
        (figure, {"function": "nowhere.at_all:f"}, "there is no module nowhere.at_all"),
        (figure, {"function": "draw"}, "write module:function"),
        (figure, {"function": f"{HERE}:not_a_figure"}, "must return (Figure, DataFrame drawn)"),
        (table, {"function": f"{HERE}:best", "inputs": {"a": ["measures/none.csv"]}}, "measures/none.csv"),
        (measure, {"function": f"{HERE}:no_table"}, "must return a DataFrame, and returned list"),
        (measure, {"function": f"{HERE}:count", "runs": ["runs/x"]}, "holds no finished run"),
        (measure, {"function": f"{HERE}:count", "device": "tpu"}, "device = 'tpu' is not allowed"),
    ],
)
def test_what_a_user_can_mend_is_one_line(results, capsys, command, values, said):
    text = json.dumps({"inputs": {"a": ["measures/one.csv"]}, "options": {}, **values})
    with pytest.raises(SystemExit) as stop:
        command.main(["--spec", text, "--results", str(results), "--out", str(results / "x.csv")])
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_spec_is_a_json_object_or_a_file_of_one(tmp_path):
    (tmp_path / "spec.json").write_text('{"a": 1}')
    assert json_object(f"@{tmp_path}/spec.json") == json_object('{"a": 1}') == {"a": 1}
    for text in ("[1]", "{", "@/nowhere"):
        with pytest.raises(Exception, match="JSON"):
            json_object(text)


def test_a_spec_may_be_longer_than_a_command_line_and_bring_its_code(results):
    content = {"job": json.loads(spec(function=f"{HERE}:best", title="x" * 200_000)), "code": "c0de"}
    (results / "a spec.json").write_text(json.dumps(content))
    table.main(["--spec", f"@{results}/a spec.json", "--results", str(results), "--out", str(results / "T.csv")])
    record = json.loads((results / "T.run.json").read_text())
    assert record["job"] == content["job"]
    assert record["code"] == "c0de"
    table.main(["--spec", f"@{results}/T.run.json", "--results", str(results), "--out", str(results / "U.csv")])
    assert json.loads((results / "U.run.json").read_text())["code"] == ""
    assert (results / "T.csv").read_bytes() == (results / "U.csv").read_bytes()


def test_a_module_that_fails_to_import_is_not_taken_for_an_absent_one(tmp_path, monkeypatch):
    (tmp_path / "half_module.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        load_function("half_module:f")


def test_figures_and_tables_are_made_without_torch():
    code = "import sys, papers.cli.{0}; sys.exit('torch' in sys.modules or 'seaborn' in sys.modules)"
    for stage in ("figure", "table", "claims"):
        done = subprocess.run([sys.executable, "-c", code.format(stage)], check=False)
        assert done.returncode == 0, stage


def test_colours_are_distinct_however_many():
    for names in (range(4), range(25)):
        assert len(set(Style().colours(names).values())) == len(names)
    assert len(set(Style().sequence(12))) == 12
