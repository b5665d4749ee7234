"""``mlpkit tune`` and ``mlpkit predict`` as commands: what they print, write and refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlpkit import cli
from mlpkit.tune import progress, trainer
from mlpkit.tune.ladder import Trial


def table(rows=40):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"size": rng.normal(size=rows), "kind": rng.choice(["a", "b"], rows)})
    frame["label"] = np.where(frame["size"] + 0.1 * rng.normal(size=rows) > 0, "up", "down")
    frame.loc[3, "size"] = np.nan
    return frame


@pytest.fixture
def mlpkit(monkeypatch, tmp_path, capsys):
    """Run a command line in an empty directory that holds t.csv: (exit code, stdout, stderr)."""
    table().to_csv(tmp_path / "t.csv", index=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlpkit", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def quick(monkeypatch):
    """Three epochs a fold: these tests are about the command, not about the scores."""
    monkeypatch.setattr(trainer, "_MAX_EPOCHS", 3)
    monkeypatch.setattr(trainer, "_MIN_STEPS", 1)


TUNE = ("tune", "t.csv", "--target", "label", "--seed", "0", "--cv", "2", "--strategy", "constructive")


def test_tune_prints_progress_on_stderr_and_the_verdict_on_stdout(mlpkit, quick, tmp_path):
    code, out, err = mlpkit(*TUNE)
    assert code == 0
    assert "label: 2 classes, 40 rows, 2 columns; 2 folds, seed 0" in err
    assert len(re.findall(r"accuracy \d\.\d{4} ± \d\.\d{4}", err)) == 7  # One plain line a candidate: no terminal here.
    assert "\x1b" not in err
    verdicts = json.loads((tmp_path / "t-run" / "report.json").read_text())["verdicts"]
    for verdict in verdicts:
        assert verdict["text"] in out
    assert "report: t-run/report.html" in out


def test_command_line_is_recorded(mlpkit, quick, tmp_path):
    mlpkit(*TUNE, "--out", "one two", "--quiet")
    report = json.loads((tmp_path / "one two" / "report.json").read_text())
    assert (
        report["environment"]["command"]
        == "mlpkit tune t.csv --target label --seed 0 --cv 2 --strategy constructive --out 'one two' --quiet"
    )
    assert "--seed 0" in (tmp_path / "one two" / "report.html").read_text()


def test_quiet_prints_the_verdict_alone(mlpkit, quick):
    _, out, err = mlpkit(*TUNE, "--quiet")
    assert err == ""
    assert "candidates" in out


def test_second_run_gets_a_name_of_its_own(mlpkit, quick, tmp_path):
    mlpkit(*TUNE, "--quiet")
    mlpkit(*TUNE, "--quiet")
    assert (tmp_path / "t-run-2" / "report.html").is_file()


def test_predict_works_without_the_target_and_gives_probabilities(mlpkit, quick, tmp_path):
    mlpkit(*TUNE, "--quiet", "--out", "run")
    table().drop(columns="label").to_csv(tmp_path / "new.csv", index=False)
    code, out, _ = mlpkit("predict", "run", "new.csv", "--out", "pred.csv")
    assert (code, out) == (0, "")
    predicted = pd.read_csv(tmp_path / "pred.csv")
    assert list(predicted.columns) == ["label", "probability of down", "probability of up"]
    assert len(predicted) == 40
    np.testing.assert_allclose(predicted.iloc[:, 1:].sum(axis=1), 1.0)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["new.csv", "pred.csv", "run", "t.csv"]
    _, printed, _ = mlpkit("predict", "run", "new.csv")
    assert printed == (tmp_path / "pred.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune", "none.csv", "--target", "label"), "no such file: none.csv"),
        (("tune", "t.csv", "--target", "lable"), "did you mean 'label'?"),
        (("tune", "t.csv", "--target", "label", "--strategy", "magic"), "auto, constructive"),
        (("tune", "t.csv", "--target", "label", "--out", "t.csv"), "t.csv exists and is a file"),
        (("tune", "t.csv", "--target", "label", "--budget", "-1"), "budget is '-1'"),
        (("predict", "nowhere", "t.csv"), "nowhere is no run directory"),
        (("predict", "nowhere", "t.csv", "--out", "."), "is a directory"),
        (("predict", "nowhere", "t.csv", "--out", "deep/pred.csv"), "directory that does not exist"),
    ],
)
def test_mistake_is_one_sentence_exit_code_2_and_no_file(mlpkit, tmp_path, arguments, words):
    code, out, err = mlpkit(*arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.startswith("mlpkit: ")
    assert err.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["t.csv"]


def test_failed_prediction_leaves_no_file(mlpkit, quick, tmp_path):
    mlpkit(*TUNE, "--quiet", "--out", "run")
    table().assign(size="text").to_csv(tmp_path / "bad.csv", index=False)
    code, _, err = mlpkit("predict", "run", "bad.csv", "--out", "pred.csv")
    assert code == 2
    assert "column 'size' must hold numbers, but data row 1 holds 'text' (and 39 more rows)" in err
    assert not (tmp_path / "pred.csv").exists()


def test_terminal_gets_a_live_bar_and_the_same_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trial = Trial((16,), 5, [trainer.Outcome(0.5, 0.6), trainer.Outcome(0.7, 0.8)], "complete")
    with progress.choose(None, "accuracy", 2) as say:
        assert isinstance(say, progress.Live)
        say.start((16,))
        say.fold(trial.outcomes[0])
        say.done(trial)
    assert "16       accuracy 0.6000" in capsys.readouterr().err


def test_the_demo_takes_a_table_and_refuses_a_bad_one_in_one_sentence(tmp_path):
    table().to_csv(tmp_path / "t.csv", index=False)
    demo = Path(__file__).parents[1] / "examples" / "demo.py"
    command = [sys.executable, demo, "t.csv", "--target", "lable", "--out", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "demo: no column 'lable' for the target; did you mean 'label'?\n"
    assert [item.name for item in tmp_path.iterdir()] == ["t.csv"]
