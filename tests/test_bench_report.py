"""``benchmarks/report.py``: the table of README.md, made from planted results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mlpkit.bench import Settings, run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(family, label, what, dtype, ratio, seconds=1e-3, baseline="eager", clock="cpu", **more):
    times = {"median": seconds, "minimum": seconds / 2}
    other = "wall" if clock == "cpu" else "cpu"
    return {
        "family": family,
        "label": label,
        "what": what,
        "dtype": dtype,
        "baseline": baseline,
        "clock": clock,
        "ratio": {baseline: {clock: {"median": ratio, "minimum": 99.0}, other: {"median": 98.0, "minimum": 97.0}}},
        "seconds": {"mlpkit": {clock: times, other: {"median": 1.0, "minimum": 1.0}}},
        "floor": {"seconds": 1e-4, "share": 0.25},
        **more,
    }


def results(*rows, **facts):
    environment = {
        "torch": "2.13.0",
        "cpu": "Some CPU",
        "cpu_capability": "avx512",
        "threads": 1,
        "rounds": 9,
        "clock": "cpu",
        "date": "2026-11-22T10:00:00+00:00",
        "quick": False,
        **facts,
    }
    return {"environment": environment, "cases": rows, "peaks": {"fp32": {"flops_per_second": 98e9}}}


ROWS = (
    row("layer", "1024 x 128 -> 256, gelu", "forward", "fp32", 3.04),
    row("layer", "1024 x 128 -> 256, gelu", "forward + backward", "fp32", 2.51, seconds=2.345e-3),
    row("layer", "1024 x 128 -> 256, gelu", "forward + backward", "bf16", 2.6),
    row("layer", "1024 x 128 -> 256, relu", "forward", "fp32", 77.0),
    row("step", "128 -> 16 -> 16 -> 10, batch 32", "training step", "fp32", 36.0, seconds=9.6e-6),
)


def test_one_row_a_size_and_one_column_a_pass(report):
    lines = report.table(results(*ROWS)).splitlines()
    assert lines[0] == (
        "| | sizes | fp32 forward | fp32 training | bf16 training | fp32 training: time | of the floor |"
    )
    assert lines[2] == "| Linear + GELU + dropout | 1024 x 128 -> 256 | 3.0x | 2.5x | 2.6x | 2.3 ms | 25 % |"
    assert lines[3] == "| training step | 128 -> 16 -> 16 -> 10, batch 32 |  | 36.0x |  | 10 us | 25 % |"
    assert lines[4] == ""
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_conditions_stand_under_the_table(report):
    text = report.table(results(*ROWS)).splitlines()[-1]
    for words in (
        "eager PyTorch 2.13.0",
        "Some CPU (avx512), 1 thread, process CPU time",
        "9 interleaved",
        "2026-11-22",
    ):
        assert words in text
    assert "98 GFLOP/s" in text
    assert "wall time" in report.table(results(*ROWS, clock="wall", threads=2))
    assert "2 threads" in report.table(results(*ROWS, clock="wall", threads=2))


def test_dropout_and_threads_become_sentences(report):
    more = (
        row("dropout", "a", "training step", "fp32", 1 / 1.03, baseline="mlpkit p=0"),
        row("dropout", "b", "training step", "fp32", 1 / 1.06, baseline="mlpkit p=0"),
        row("threads", "a", "forward", "fp32", 1.9, baseline="mlpkit, 1 thread", clock="wall", of_probe=0.95),
    )
    text = report.table(results(*ROWS, *more))
    assert "Dropout 0.1 takes 1.03 to 1.06 times as long as p = 0." in text
    assert "A second thread brings 95 % of what it brings to the probe." in text
    assert "Dropout" not in report.table(results(*ROWS)).splitlines()[-1]


def test_real_results_fit_the_table(report):
    settings = Settings(rounds=2, dtypes=("fp32",), quick=True, seconds_a_round=0.0)
    lines = report.table(run(["tiny", "step", "dropout", "threads"], settings)).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["Linear + GELU + dropout", "training step"]
    assert "Dropout 0.1 takes" in lines[-1]


def test_only_what_lies_between_the_markers_changes(report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(readme, "new")
    report.write(readme, "newer")
    assert readme.read_text() == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"


def test_the_readme_of_this_tree_has_the_markers(report):
    text = report.README.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1


def test_figures_of_a_quick_run_are_refused(report, tmp_path, monkeypatch):
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(results(*ROWS, quick=True)))
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    with pytest.raises(SystemExit, match="quick"):
        report.main()


def test_a_populations_rivals_are_columns_and_threads_and_fits_a_sentence(report):
    rivals = {"stacked": 7.25, "vmap": 8.5}
    ratio = {name: {"cpu": {"median": value, "minimum": 99.0}} for name, value in rivals.items()}
    train = row("population", "3 x (128 -> w), w = 16", "training", "fp32", 1.0, microseconds_a_step=5.25)
    mixed = row("population", "3 x mixed", "training", "fp32", 9.5, baseline="stacked", microseconds_a_step=12.0)
    threads = row("population", "two", "two threads", "fp32", 1.9, gain=1.75, of_probe=0.94)
    fits = row("population", "fits of digits: 6", "fits", "fp32", 35.0, baseline="DataLoader loop")
    fits |= {"trials_a_minute, mlpkit": 12345.6}
    lines = report.population_table(results(train | {"ratio": ratio}, mixed, threads, fits)).splitlines()
    assert lines[0] == "| population | stacked | vmap | a step of a member | of the floor |"
    assert lines[2] == "| 3 x (128 -> w), w = 16 | 7.2x | 8.5x | 5.2 us | 25 % |"
    assert lines[3] == "| 3 x mixed | 9.5x |  | 12.0 us | 25 % |"
    assert "bring 1.75 times the speed of one, 94 % of what they bring to the probe" in lines[-1]
    assert "(6): 12,346 a CPU minute, 35 times as many as by DataLoader loop." in lines[-1]


def test_accuracy_has_one_row_a_tool_and_times_over_the_plain_loops(report):
    counts = {"failures": 330, "fired": 300, "where": 290, "cause": 280, "silent": 51, "explained": 50, "healthy": 405}
    facts = {"name": "accuracy", "faults": 110, "healthy": 135, "variants": [0, 1, 2], "torch": "2.13.0"}
    facts["table"] = {"mlpkit": counts, "anomaly mode": {"failures": 330, "fired": 241, "alarms": 3, "healthy": 405}}
    lines = report.accuracy_table(facts).splitlines()
    assert lines[2] == "| mlpkit | 300 of 330 | 290 of 330 | 280 of 330 | 50 of 51 | 0 of 405 |"
    assert lines[3].endswith("| 3 of 405 |")
    ratio = {"eager": 0.8, "observe": 0.88, "detect_anomaly": 1.6}
    case = row("trace", "tiny", "watched training", "fp32", 1.0)
    case["ratio"] = {name: {"cpu": {"median": value}} for name, value in ratio.items()}
    facts["overhead"] = {"environment": results()["environment"], "cases": [case]}
    lines = report.accuracy_table(facts).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:5]] == ["1.10x", "2.00x", "1.25x"]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "median of 9 interleaved rounds" in lines[-1]
