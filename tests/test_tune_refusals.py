"""What ``tune`` refuses, and that a failure leaves nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_tune import classes, line_table, numbers, tune

from mlpkit.errors import ArgumentError, DataError, MissingExtraError, OutputError, ShapeError
from mlpkit.tune import TunedModel, run, search

__all__ = ["classes", "numbers"]  # Fixtures.


# Nothing half-written


def test_failure_while_writing_leaves_no_trace(monkeypatch, tmp_path, numbers):
    def fail(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(run.Run, "report", fail)
    with pytest.raises(OSError, match="disk full"):
        numbers[0].save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_earlier_run_is_replaced_only_on_request(tmp_path, numbers, classes):
    numbers[0].save(tmp_path / "run")
    with pytest.raises(ArgumentError, match="earlier run"):
        classes[0].save(tmp_path / "run")
    assert TunedModel.load(tmp_path / "run").task == "regression"
    classes[0].save(tmp_path / "run", overwrite=True)
    assert TunedModel.load(tmp_path / "run").task == "classification"
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_earlier_run_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, numbers, classes, monkeypatch):
    numbers[0].save(tmp_path / "run")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no room")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OutputError, match="run: no room"):
        classes[0].save(tmp_path / "run", overwrite=True)
    assert TunedModel.load(tmp_path / "run").task == "regression"
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_directory_with_other_files_is_never_touched(tmp_path, numbers):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArgumentError, match="other files"):
        numbers[0].save(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.json", "{"), ("model.json", '{"format": "other", "version": 1}'), ("model.safetensors", "garbage")],
)
def test_damaged_model_is_one_clear_error(tmp_path, numbers, name, content):
    numbers[0].save(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(DataError, match=r"damaged|format"):
        TunedModel.load(tmp_path / "run")


def test_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no run directory: it has no model\.json"):
        TunedModel.load(tmp_path)


# Bad arguments


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": "genetic"}, "auto, constructive"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": "soon"}, "budget is 'soon'"),
        ({"space": {"lr": "fast"}}, "part 'lr'"),
        ({"budget": float("nan")}, "budget"),
        ({"cv": 1}, "from 2 to 20"),
        ({"cv": 2.5}, "whole number of folds"),
        ({"random_state": -1}, "random_state is -1"),
        ({"random_state": "seven"}, "random_state"),
        ({"task": "ranking"}, "auto, classification, regression"),
        ({"ignore": ["Q"]}, "did you mean 'q'"),
    ],
)
def test_bad_argument_is_named_with_what_is_wanted(change, words):
    with pytest.raises(ArgumentError, match=words):
        tune(line_table(40), "y", progress=False, **change)


def test_shapes_that_do_not_fit_are_named():
    frame = line_table(40)
    with pytest.raises(ShapeError, match="X has 40 rows, y has 39"):
        tune(frame[["p"]], frame["y"][:39], progress=False)
    with pytest.raises(ShapeError, match="of rows and columns"):
        tune(np.zeros(40), frame["y"], progress=False)
    with pytest.raises(ShapeError, match="one target"):
        tune(frame[["p"]], frame[["p", "y"]], progress=False)


def test_unusable_out_is_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "read_problem", lambda *_: pytest.fail("the table was read"))
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ArgumentError, match=r"exists and is a file"):
        tune(line_table(40), "y", out=tmp_path / "taken", progress=False)
    with pytest.raises(ArgumentError, match="taken is a file; a folder is wanted"):
        tune(line_table(40), "y", out=tmp_path / "taken" / "run", progress=False)


@pytest.mark.parametrize("module", ["pandas", "optuna", "safetensors", "plotly", "jinja2"])
def test_missing_extra_names_the_pip_line_before_any_training(module, monkeypatch, tmp_path):
    monkeypatch.setattr(search, "read_problem", lambda *_: pytest.fail("the table was read"))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r'pip install "mlpkit\[tune,report\]"'):
        tune(np.zeros((24, 2)), np.arange(24.0), out=tmp_path / "run", progress=False)


def test_import_of_tune_loads_no_table_library():
    code = "import sys, mlpkit.tune; assert not {'pandas', 'optuna', 'sklearn', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
