"""guard.History: the steps of a run as rows, JSON lines, TensorBoard scalars and one page."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from guard_runs import Run, gradient_of, inf_in_one_element, poison

from mlpkit import nn as fused
from mlpkit.errors import ArgumentError, MissingExtraError, OutputError
from mlpkit.guard import History, TrainStep
from mlpkit.guard.history import COLUMNS


@pytest.fixture
def run():
    """Six steps in float16, one of them with a bad batch and one with a bad gradient."""
    run = Run(precision="fp16", history=History())
    run.take(3)
    x, y = run.batch()
    run.step(poison(torch.nan)(x), y)
    run.take(1)
    with gradient_of(run.model[0].weight, inf_in_one_element):
        run.step(*run.batch())
    return run


def test_every_step_is_a_row(run):
    rows = run.step.history.rows()
    assert [row["step"] for row in rows] == list(range(6))
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [row["skipped"] for row in rows] == [False, False, False, True, False, True]
    assert [(row["where"], row["culprit"], row["nature"], row["kind"]) for row in rows if row["skipped"]] == [
        ("inputs", "inputs", "data", "NaN"),
        ("gradient", "0.weight", "calibration", "Inf"),
    ]
    assert math.isnan(rows[3]["loss"])
    assert rows[2]["grad_norm"] > 0
    assert 0 < rows[2]["headroom"] < 16
    assert rows[3]["headroom"] is None
    assert list(run.step.history) == rows
    assert run.step.history.records == run.step.records
    assert "6 steps, 2 skipped" in str(run.step.history)
    assert "calibration" in str(run.step.history)


def test_native_and_accumulated_steps_are_rows_too():
    model = fused.MLP(5, (8,), 3)
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), 0.1), history=History(limit=2))
    results = [step(torch.randn(4, 5), torch.randn(4, 3)) for _ in range(3)]
    assert step.path == "native"
    assert [(row["step"], row["loss"]) for row in step.history.rows()] == [(i, results[i].loss) for i in (1, 2)]
    run = Run(accumulate=2, history=History())
    losses = [run.step(*run.batch()).loss for _ in range(4)]
    assert [row["loss"] for row in run.step.history] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])


def test_a_rollback_is_told():
    run = Run(history=History(), on_nonfinite="rollback")
    run.take(1)
    x, y = run.batch()
    run.step(x * torch.nan, y)
    assert run.step.history.rows()[1]["action"] == "rollback to step 0"


def test_a_step_taken_in_float32_is_no_skip(run):
    history, record = History(), run.step.records[0]
    history.add(0, 1.0, 1.0, 1.0, record)
    history.add(1, 1.0, 1.0, 1.0, replace(record, action="fp32 step"))
    assert [row["skipped"] for row in history] == [True, False]
    assert "2 steps, 1 skipped" in str(history)
    assert [one.action for one in history.records] == ["", "fp32 step"]


def test_a_name_is_shown_as_it_is_and_never_read_as_markup(run):
    history = History()
    history.add(0, 1.0, 1.0, 1.0, replace(run.step.records[1], culprit="[/x]"))
    assert "[/x]" in str(history)


def test_json_lines_hold_rows_and_whole_records(run, tmp_path):
    lines = run.step.history.write_jsonl(tmp_path / "deep" / "run.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[3]["loss"] == "NaN"
    assert "record" not in rows[0]
    record = rows[5]["record"]
    assert (record["culprit"], record["first_index"], record["shape"]) == ("0.weight", 11, [8, 5])
    assert record["absmax"][-1] == "Inf"
    assert len(record["absmax"]) == 6
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        run.step.history.write_jsonl(tmp_path / "file" / "run.jsonl")


class Writer:
    """What of a SummaryWriter is used."""

    def __init__(self):
        self.scalars, self.texts, self.flushed = {}, [], False

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, {})[step] = value

    def add_text(self, tag, text, step):
        self.texts.append((tag, step, text))

    def flush(self):
        self.flushed = True


def test_tensorboard_gets_scalars_and_the_text_of_every_skip(run):
    writer = Writer()
    run.step.history.write_tensorboard(writer, prefix="train")
    assert writer.flushed
    assert writer.scalars["train/scale"] == dict.fromkeys(range(6), 65536.0)
    assert writer.scalars["train/skipped"] == {0: 0, 1: 0, 2: 0, 3: 1, 4: 0, 5: 1}
    assert writer.scalars["train/headroom"].keys() == {0, 1, 2, 4}
    assert [(tag, step) for tag, step, _ in writer.texts] == [("train/skip", 3), ("train/skip", 5)]
    assert writer.texts[1][2] == str(run.step.records[1])


def test_a_folder_without_tensorboard_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mlpkit\[tensorboard\]"'):
        run.step.history.write_tensorboard(tmp_path)


def test_the_page_shows_curves_and_skips(run, tmp_path):
    page = run.step.history.report(tmp_path / "guard.html").read_text()
    assert "6 steps, 2 skipped" in page
    for word in ("Loss scale", "Headroom", "Gradient norm", "0.weight", "calibration", "inputs"):
        assert word in page
    assert "<script src" not in page
    assert "none skipped" in History().report(tmp_path / "empty.html").read_text()


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_wrong_limit_is_refused(limit):
    with pytest.raises(ArgumentError, match="History: limit is"):
        History(limit)
