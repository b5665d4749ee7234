"""The CSV zoo: what files hold in the wild is read for what it means, or refused in one clear sentence."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest

from mlpkit import cli
from mlpkit.errors import DataError
from mlpkit.tune import tune
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.problem import read_problem
from mlpkit.tune.table import read_csv

ROWS = 40
NUMBERS = [f"{value:.3f}" for value in np.random.default_rng(0).normal(size=ROWS)]
LABELS = ["no", "yes"] * (ROWS // 2)


def text(names, *columns, separator=","):
    return "".join(separator.join(cells) + "\n" for cells in [names, *zip(*columns)])


def written(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


def test_quotes_hold_separators_quotes_and_line_ends(tmp_path):
    rows = "".join(f'{NUMBERS[at]},"x ""{at % 3}"", y\nz",{LABELS[at]}\n' for at in range(ROWS))
    frame = read_csv(written(tmp_path / "t.csv", 'a,"b, c",label\n' + rows))
    assert list(frame.columns) == ["a", "b, c", "label"]
    assert set(frame["b, c"]) == {f'x "{number}", y\nz' for number in range(3)}


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas_are_numbers_where_commas_separate_nothing(tmp_path, separator):
    commas = [number.replace(".", ",") for number in NUMBERS]
    large = ["1.234,5", "-12.345.678,25", "7", "0,5"] * (ROWS // 4)
    gaps = ["", *commas[1:]]
    content = text(["a", "b", "c", "d"], commas, large, gaps, NUMBERS, separator=separator)
    frame = read_csv(written(tmp_path / "t.csv", content))
    np.testing.assert_array_equal(frame["a"], list(map(float, NUMBERS)))
    assert frame["b"][:4].tolist() == [1234.5, -12345678.25, 7.0, 0.5]
    assert frame["c"].isna().sum() == 1
    assert frame["c"][1] == float(NUMBERS[1])
    assert frame["d"].tolist() == frame["a"].tolist()


def test_a_bad_cell_among_decimal_commas_is_named(tmp_path):
    commas = [number.replace(".", ",") for number in NUMBERS]
    path = written(tmp_path / "t.csv", text(["a", "label"], [*commas[:6], "much", *commas[7:]], LABELS, separator=";"))
    with pytest.raises(DataError, match="column 'a' must hold numbers, but data row 7 holds 'much'"):
        tune(read_csv(path), "label", budget="1 trials", progress=False)


def test_a_comma_between_words_stays_text(tmp_path):
    frame = read_csv(
        written(tmp_path / "t.csv", text(["a", "b"], ["one, two", "1,5", "three"], ["1", "2", "3"], separator="\t"))
    )
    assert frame["a"].tolist() == ["one, two", "1,5", "three"]


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d.%m.%Y", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S"])
def test_dates_are_days(tmp_path, form):
    days = pd.date_range("2024-01-25", periods=ROWS, freq="D")
    frame = read_csv(written(tmp_path / "t.csv", text(["d", "y"], days.strftime(form), NUMBERS)))
    assert frame["d"].tolist() == days.tolist()
    run = tune(frame, "y", budget="1 trials", random_state=0, progress=False)
    assert [(column.name, column.kind) for column in run.estimator.columns] == [("d", "numeric")]


@pytest.mark.parametrize("cells", [["2024-01-02", "soon"], ["31.31.2024", "01.01.2024"], ["2024-13-01", "2024-01-01"]])
def test_what_is_no_date_stays_text(tmp_path, cells):
    frame = read_csv(written(tmp_path / "t.csv", text(["d"], cells)))
    assert frame["d"].tolist() == cells


def test_ten_thousand_columns_are_a_table(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 10_000)).round(2).astype(str)
    names = [f"c{number}" for number in range(10_000)]
    frame = read_csv(written(tmp_path / "t.csv", text([*names, "label"], *values.T, LABELS[:20])))
    assert frame.shape == (20, 10_001)
    problem = read_problem(frame, "label", "auto", 2)
    assert len(problem.columns) == 10_000
    assert Encoder.fit(problem.data, problem.columns, np.arange(20)).transform(problem.data).shape == (20, 10_000)


@pytest.mark.parametrize("scale", ["e-300", "e300"])
def test_the_ends_of_what_a_float_holds_can_be_learnt(tmp_path, scale):
    tall = [f"{-1 if label == 'no' else 1}{scale}" for label in LABELS]
    frame = read_csv(written(tmp_path / "t.csv", text(["a", "b", "label"], tall, NUMBERS, LABELS)))
    run = tune(frame, "label", budget="1 trials", cv=2, random_state=0, progress=False)
    assert run.winner.mean == 1.0
    assert np.isfinite(run.estimator.predict_proba(frame)).all()


BAD = {
    "one column": (text(["label"], LABELS), "no column beside the target"),
    "constant": (text(["a", "label"], NUMBERS, ["x"] * ROWS), "only one class (x)"),
    "twice": (text(["a", " a", "label"], NUMBERS, NUMBERS, LABELS), "'a' appears more than once"),
    "inf": (text(["a", "label"], [*NUMBERS[:-1], "-inf"], LABELS), "holds infinity in data row 40"),
    "thousands": (text(["a", "label"], ['"1,234.5"', *NUMBERS[1:]], LABELS), "data row 1 holds '1,234.5'"),
    "a NUL": (text(["a", "label"], ["\0", *NUMBERS[1:]], LABELS), "must hold numbers, but data row 1"),
    "no text": ("\x89PNG\r\n\x1a\n", "is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_learnt_is_one_sentence_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    content, words = BAD[name]
    written(tmp_path / "t.csv", content, "latin-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlpkit", "tune", "t.csv", "--target", "label", "--budget", "1 trials"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in told, told
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


EVIL = "<script>alert('x')</script>"


def test_script_in_names_and_values_is_escaped_in_every_file(tmp_path):
    frame = pd.DataFrame(
        {EVIL: list(map(float, NUMBERS)), "c": [EVIL, "b"] * (ROWS // 2), "y": [EVIL, "b", "b", EVIL] * 10}
    )
    run = tune(
        frame.rename(columns={"y": EVIL + "y"}), EVIL + "y", budget="3 trials", cv=2, random_state=0, progress=False
    )
    run.save(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert EVIL not in page
    assert "alert(" in page  # It is there, as text.
    assert json.loads((tmp_path / "run" / "report.json").read_text())["target"] == EVIL + "y"
