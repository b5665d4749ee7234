"""Tables as they come: what columns and targets are taken for, and one clear sentence for what cannot be used."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch

from mlpkit.errors import ArgumentError, DataError, MissingExtraError
from mlpkit.tune import read_csv, read_table
from mlpkit.tune.problem import read_problem, target_scale
from mlpkit.tune.table import clean, fingerprint, learn_columns, take_target, to_frame
from mlpkit.tune.target import learn_target

ROWS = 40


def frame_with(**columns):
    base = pd.DataFrame({"a": np.arange(ROWS, dtype=float), "y": np.arange(ROWS) % 2})
    return base.assign(**columns)


def problem_of(frame, task="auto", **options):
    return read_problem(frame, "y", task, 5, **options)


def kinds_of(frame, **options):
    return {column.name: column.kind for column in problem_of(frame, **options).columns}


def task_of(values):
    return learn_target(pd.Series(values, name="y"), "auto", 2)[0]


# Files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a,b\n", "has a header line but no rows"),
        (b"a,b\n1,2\n1,2,3,4\n", "no regular CSV"),
        (b"a,b\n0,1,2\n1,3,4\n", "rows have more cells than its header has names"),
        (b"a,b\n\xff\xfe,1\n", "not UTF-8"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_unreadable_file_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_csv(path)
    assert "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_file_and_directory_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a directory"):
        read_csv(tmp_path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_usual_separators_a_byte_order_mark_and_question_marks_are_read(tmp_path, separator):
    path = tmp_path / "t.csv"
    lines = [["a", "b"], ["1", "x"], ["?", ""]]
    path.write_text("\ufeff" + "\n".join(separator.join(line) for line in lines), encoding="utf-8")
    frame = read_csv(path)
    assert list(frame.columns) == ["a", "b"]
    assert frame["a"].tolist()[0] == 1.0
    assert frame.isna().sum().tolist() == [1, 1]


def test_a_separator_at_the_end_of_each_row_is_no_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2,\n3,4,\n")
    assert read_csv(path).to_dict("list") == {"a": [1, 3], "b": [2, 4]}


# Columns


def test_kinds_are_inferred():
    frame = frame_with(
        flag=[True, False] * (ROWS // 2),
        colour=["red", "blue"] * (ROWS // 2),
        digits=[str(number) for number in range(ROWS)],
        day=pd.date_range("2020-01-01", periods=ROWS),
        group=pd.Categorical([1, 2] * (ROWS // 2)),
    )
    assert kinds_of(frame) == {
        "a": "numeric",
        "flag": "numeric",
        "colour": "categorical",
        "digits": "numeric",
        "day": "numeric",
        "group": "categorical",
    }
    assert kinds_of(frame, categorical=["digits"], ignore=["day", "group"])["digits"] == "categorical"


def test_dates_become_days_and_missing_ones_gaps():
    frame = pd.DataFrame({"day": pd.to_datetime(["1970-01-02", None, "1970-01-04"])})
    columns, _ = learn_columns(frame)
    np.testing.assert_array_equal(clean(frame, columns)["day"], [1.0, np.nan, 3.0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([np.nan] * ROWS, "'b' is empty and was left out"),
        ([7] * ROWS, "'b' holds a single value and was left out"),
        ([f"id {number}" for number in range(ROWS)], "'b' holds 40 different texts in 40 rows and was left out"),
    ],
)
def test_useless_column_is_left_out_with_a_note(values, words):
    problem = problem_of(frame_with(b=values))
    assert [column.name for column in problem.columns] == ["a"]
    assert any(words in note for note in problem.notes)


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(DataError, match="no usable input column is left: column 'a' is empty"):
        problem_of(frame_with(a=np.nan))
    with pytest.raises(DataError, match="no column beside the target"):
        problem_of(frame_with()[["y"]])


def test_text_among_numbers_names_the_row_and_the_cell():
    values = [str(number) for number in range(ROWS)]
    values[4] = "five"
    with pytest.raises(DataError, match="column 'b' must hold numbers, but data row 5 holds 'five'"):
        problem_of(frame_with(b=values))
    assert kinds_of(frame_with(b=values), ignore=["b"]) == {"a": "numeric"}


def test_infinity_names_the_row_of_the_file_even_after_rows_were_left_out():
    frame = frame_with(b=np.arange(ROWS, dtype=float))
    frame.loc[9, "b"] = np.inf
    frame["y"] = frame["y"].astype(float)
    frame.loc[2, "y"] = np.nan
    with pytest.raises(DataError, match="'b' holds infinity in data row 10"):
        problem_of(frame)


def test_cells_that_are_no_values_and_numbers_beyond_squares_are_refused():
    with pytest.raises(
        DataError, match=r"column 'b' holds cells that are neither numbers nor text, such as '\[1, 2\]'"
    ):
        problem_of(frame_with(b=[[1, 2]] * ROWS))
    problem = problem_of(frame_with(y=np.linspace(0.0, 1e200, ROWS)))
    with pytest.raises(DataError, match="target 'y' holds numbers too large to square"):
        target_scale(problem.target, np.arange(ROWS))


def test_complex_numbers_and_double_names_are_refused():
    with pytest.raises(DataError, match="complex128"):
        problem_of(frame_with(b=np.ones(ROWS) * 1j))
    with pytest.raises(DataError, match="'a' appears more than once"):
        to_frame(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(DataError, match="no column 'Y' for the target; did you mean 'y'"):
        take_target(frame_with(), "Y")
    with pytest.raises(DataError, match="; the columns are a, y"):
        take_target(frame_with(), "something else")
    with pytest.raises(ArgumentError, match="did you mean 'a'"):
        problem_of(frame_with(), categorical=["A"])


def test_fingerprint_follows_values_and_names_not_the_way_they_came(tmp_path):
    frame = frame_with(c=["x", None] * (ROWS // 2))
    frame.to_csv(tmp_path / "t.csv", index=False)
    again = read_csv(tmp_path / "t.csv")

    def of(table):
        return fingerprint(table[["a", "c"]], table["y"])

    assert of(frame) == of(again)
    assert of(frame) != of(frame.assign(a=frame["a"] + 1))
    assert of(frame) != fingerprint(frame[["a", "c"]], frame["y"].rename("z"))


def test_arrays_dictionaries_lists_and_arrow_tables_are_tables():
    import pyarrow

    for table in (np.ones((3, 2)), [[1, "a"], [2, "b"]], torch.ones(3, 2)):
        assert list(to_frame(table).columns) == ["x0", "x1"]
    for table in ({"p": [1], "q": [2]}, pyarrow.table({"p": [1], "q": [2]})):
        assert list(to_frame(table).columns) == ["p", "q"]


# Target


def test_task_is_inferred():
    assert task_of(["b", "a"] * 10).task == "classification"
    assert task_of([True, False] * 10).task == "classification"
    assert task_of(list(range(4)) * 10).task == "classification"
    assert task_of([0.0, 1.0] * 10).classes == (0, 1)
    assert task_of(list(range(40))).task == "regression"  # Whole, but one row each.
    assert task_of(np.linspace(0, 1, 30)).task == "regression"


def test_labels_keep_their_type_and_order():
    target = task_of(["b", "a", "b"] * 8)
    assert target.classes == ("a", "b")
    assert target.values[:3].tolist() == [1, 0, 1]
    assert task_of([True, False] * 10).classes == (False, True)


def test_rows_without_a_target_are_left_out_with_a_note():
    frame = frame_with().astype(float)
    frame.loc[:4, "y"] = np.nan
    problem = problem_of(frame)
    assert problem.rows == ROWS - 5
    assert "5 rows have no target and were left out" in problem.notes


WITH_TEXT = [str(1.5 * number) for number in range(7)] + ["abc"] + [str(1.5 * number) for number in range(7, ROWS - 1)]


@pytest.mark.parametrize(
    ("values", "task", "words"),
    [
        (["a"] * ROWS, "auto", r"only one class \(a\)"),
        ([3.5] * ROWS, "regression", r"only one value \(3\.5\)"),
        ([f"name {number}" for number in range(ROWS)], "auto", "40 different values in 40 rows: too many for classes"),
        (np.linspace(0, 1, ROWS), "classification", "too many for classes; use the task regression"),
        (["a", "b"] * (ROWS // 2), "regression", r"must hold numbers, but data row 1 holds 'a' \(and 39 more rows\)"),
        (WITH_TEXT, "auto", "must hold numbers, but data row 8 holds 'abc'; if the values are classes, give the task"),
        (WITH_TEXT, "regression", "target 'y' must hold numbers, but data row 8 holds 'abc'$"),
        (np.arange(ROWS) * 1j, "auto", "target 'y' has type complex128, which cannot be predicted"),
        (pd.date_range("2020-01-01", periods=ROWS), "auto", r"target 'y' has type datetime64\[\w+\], which cannot be"),
        (pd.Categorical(["1", "2"] * (ROWS // 2)), "regression", "must hold numbers for a regression, but holds categ"),
        (["a"] * (ROWS - 2) + ["b"] * 2, "auto", "class 'b' of target 'y' has 2 rows, but 5 folds need 5"),
        ([np.inf] + [0.5] * (ROWS - 1), "regression", "'y' holds infinity in data row 1"),
        ([np.nan] * ROWS, "auto", "target 'y' is empty: no row has a value"),
    ],
)
def test_target_that_cannot_be_learnt_is_one_sentence(values, task, words):
    with pytest.raises(DataError, match=words):
        problem_of(frame_with(y=values), task)


def test_one_text_among_repeated_numbers_makes_no_classes_of_them():
    values = ["unknown" if row == 5 else str(100 * (row % 25)) for row in range(200)]
    frame = pd.DataFrame({"a": np.arange(200.0), "y": values})
    with pytest.raises(DataError, match="'y' must hold numbers, but data row 6 holds 'unknown'"):
        problem_of(frame)
    assert problem_of(frame, "classification").target.task == "classification"


def test_three_rows_are_too_few():
    with pytest.raises(DataError, match="3 rows with a target are too few: 5 folds need at least 20"):
        problem_of(frame_with()[:3])


def test_rare_class_beside_two_common_ones_is_kept_with_a_note():
    problem = problem_of(frame_with(y=["a", "b"] * 19 + ["c", "c"]))
    assert problem.target.classes == ("a", "b", "c")
    assert "class 'c' has only 2 rows" in problem.notes


# Parquet


def test_a_parquet_file_is_the_same_table_as_its_csv(tmp_path):
    frame = pd.DataFrame({"a": [1.5, None, 3.0], "kind": ["x", None, "z"], "n": [1, 2, 3]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    one, other = read_table(tmp_path / "t.parquet"), read_table(tmp_path / "t.csv")
    columns, _ = learn_columns(one)
    assert columns == learn_columns(other)[0]
    for name, values in clean(one, columns).items():
        assert [str(value) for value in values] == [str(value) for value in clean(other, columns)[name]]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"", "is no Parquet file"), (b"PAR1" + b"\0" * 40 + b"PAR1", "is no Parquet file")],
)
def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "t.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        read_table(path)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_rows_or_without_pyarrow_is_named(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": pd.Series([], dtype=float)}).to_parquet(path)
    with pytest.raises(DataError, match="no rows"):
        read_table(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="a Parquet file needs pyarrow"):
        read_table(path)
