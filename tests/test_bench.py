"""``mlpkit bench``: what it measures, writes, prints and refuses. No test looks at how fast anything is."""

from __future__ import annotations

import gc
import json
import sys

import pytest
import torch

import mlpkit
from mlpkit import cli
from mlpkit.bench import case, cases, machine, measure, table
from mlpkit.bench.case import OURS, Case, Rival, Settings
from mlpkit.bench.cases import census, threads
from mlpkit.bench.cases._layer import Layer
from mlpkit.bench.cases._network import Network
from mlpkit.bench.page import page
from mlpkit.bench.peak import Peaks, products
from mlpkit.bench.runner import finished, run, write

QUICK = Settings(rounds=2, quick=True, seconds_a_round=0.0)


def spent(*seconds, cpu=1.0):
    """Planted times: one wall second a round, CPU time ``cpu`` times as much."""
    return [{"wall": value, "cpu": cpu * value} for value in seconds]


def planted_peaks(flops):
    peaks = Peaks(QUICK)
    peaks.of = lambda dtype: {"flops_per_second": flops}
    return peaks


def planted_case(**changes):
    facts = {"label": "", "sizes": {}, "what": "forward", "dtype": "fp32", "work": 2e9, "build": dict}
    return Case(**{"family": "layer", **facts, **changes})


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run ``mlpkit bench`` in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlpkit", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_family_runs_and_its_rows_are_whole(family):
    results = run([family], QUICK)
    assert results["cases"] or results["skipped"]
    for row in results["cases"]:
        assert row["family"] == family
        assert row["baseline"] in row["ratio"]
        assert row["clock"] in measure.CLOCKS
        for seconds in row["seconds"].values():
            for clock in measure.CLOCKS:
                assert 0 < seconds[clock]["minimum"] <= seconds[clock]["median"]
        assert ("floor" in row) == (row["work"] > 0)
        assert all(cell for cell in table.cells(row))
    assert json.loads(json.dumps(results)) == results


def test_a_run_leaves_threads_and_random_state_as_they_were():
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    run(["threads"], QUICK)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_are_shown_as_they_are_done():
    shown = []
    results = run(["dropout"], QUICK, shown.append)
    assert shown == results["cases"]


def test_ratios_are_medians_of_rounds_and_of_minima():
    times = {OURS: spent(1.0, 2.0, 4.0), "eager": spent(3.0, 4.0, 4.0, cpu=2.0), "probe": spent(9.0, 9.0, 9.0)}
    summary = measure.summarise(times, beside=["probe"])
    assert summary["seconds"][OURS]["wall"] == {"median": 2.0, "minimum": 1.0}
    assert summary["seconds"]["eager"]["cpu"] == {"median": 8.0, "minimum": 6.0}
    # 3/1, 4/2, 4/4 by rounds: not the ratio of the medians.
    assert summary["ratio"] == {
        "eager": {"wall": {"median": 2.0, "minimum": 3.0}, "cpu": {"median": 4.0, "minimum": 6.0}}
    }
    assert "probe" in summary["seconds"]


def test_share_of_the_floor_comes_from_work_peak_threads_and_our_best_time():
    times = {OURS: spent(2.0, 4.0, cpu=2.0), "eager": spent(8.0, 8.0)}
    row = finished(planted_case(), times, Settings(), planted_peaks(1e9))  # two seconds' work at the peak
    assert (row["clock"], row["threads"]) == ("cpu", 1)
    assert row["floor"] == {"seconds": 2.0, "share": 0.5}
    row = finished(planted_case(), times, Settings(threads=2), planted_peaks(1e9))
    assert (row["clock"], row["threads"]) == ("wall", 2)
    assert row["floor"] == {"seconds": 1.0, "share": 0.5}


def test_gain_of_threads_is_held_against_the_probe_which_does_twice_the_work():
    times = {
        OURS: spent(1.0, 1.0, 1.0),
        threads.ONE: spent(1.8, 1.5, 1.9),
        threads.PROBE: spent(1.0, 1.0, 1.0),
        threads.PROBE_ONE: spent(0.9, 1.0, 0.8),
    }
    assert threads.gains(times) == pytest.approx({"gain": 1.8, "probe_gain": 1.8, "of_probe": 1.0})


def test_rounds_are_interleaved_and_begin_with_another_rival_each_time():
    calls = []
    rivals = {name: Rival(lambda name=name: calls.append(name)) for name in "abc"}
    times = measure.measure(rivals, Settings(rounds=3, seconds_a_round=0.0))
    assert "".join(calls)[-9:] == "abcbcacab"
    assert [len(rounds) for rounds in times.values()] == [3, 3, 3]


def test_each_rival_runs_on_its_threads_and_nothing_is_collected_meanwhile():
    seen = {}
    rivals = {
        "own": Rival(lambda: seen.update(own=(torch.get_num_threads(), gc.isenabled())), threads=2),
        "run's": Rival(lambda: seen.update(runs=(torch.get_num_threads(), gc.isenabled()))),
    }
    measure.measure(rivals, Settings(rounds=1, seconds_a_round=0.0))
    assert seen == {"own": (2, False), "runs": (1, False)}
    assert gc.isenabled()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("rows", "width", "microseconds"),
    [(32, 16, 3.1), (32, 64, 17.5), (32, 256, 154), (256, 16, 24), (256, 64, 140), (256, 256, 1234)],
)
def test_work_of_a_step_gives_the_floors_of_112_gflops(rows, width, microseconds):
    assert Network.of_width(rows, width).work / 112e9 * 1e6 == pytest.approx(microseconds, rel=0.03)


def test_work_of_a_layer_is_one_product_forward_and_three_in_all():
    assert Layer((2, 3, 5), "fp32", backward=False).work == 60
    assert Layer((2, 3, 5), "fp32", backward=True).work == 180


def test_torch_compile_is_a_rival_when_asked_for():
    layer, network = Layer((8, 16, 8), "fp32", backward=True), Network.of_width(8, 8)
    for part in (layer, network):
        assert "compile" in part.rivals(Settings(compile=True))
        assert "compile" not in part.rivals(Settings())


def test_a_step_says_which_path_it_took():
    (row,) = (row for row in run(["step"], QUICK)["cases"] if row["dtype"] == "fp32")
    assert row["about"][OURS]


def test_every_product_of_the_probe_is_a_product():
    x, w, out = torch.randn(8, 16), torch.randn(4, 16), torch.empty(8, 4)
    for name, product in products().items():
        found = product(x, w, out)
        assert torch.allclose(found, x @ w.t(), atol=1e-5), name


def test_torch_counts_what_the_census_counts():
    x = torch.tensor([0.0, -0.0, 1.5, -7e4, 1e-5, 1e-40, torch.inf, -torch.inf, torch.nan, torch.nan])
    ours = mlpkit.census(x)
    counts = [ours.nan, ours.posinf, ours.neginf, ours.zero, ours.subnormal, ours.above_fp16_max, ours.below_fp16_min]
    assert census.by_torch(x) == [*counts, ours.absmax, ours.min_nonzero]


def test_figures_of_an_installed_package_name_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(mlpkit, "__file__", str(tmp_path / "site-packages" / "mlpkit" / "__init__.py"))
    assert machine.commit() is None


def test_json_holds_versions_machine_and_conditions(command, tmp_path):
    code, out, err = command("tiny", "--quick", "--dtypes", "fp32", "--out", "new/results.json")
    assert code == 0
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["schema"] == 2
    facts = results["environment"]
    assert facts["torch"] == torch.__version__
    assert {
        "date",
        "commit",
        "python",
        "cpu",
        "cores",
        "cpu_capability",
        "load",
        "load_after",
        "rivals",
    } <= facts.keys()
    assert (facts["threads"], facts["rounds"], facts["clock"], facts["quick"]) == (1, 2, "cpu", True)
    assert results["peaks"]["fp32"]["product"] in products()
    assert [row["what"] for row in results["cases"]] == ["forward", "forward + backward"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
    assert "\x1b" not in out
    assert len(out.splitlines()) == 3  # the conditions, and a line a row
    assert "wrote new/results.json" in err


def test_own_sizes_take_the_place_of_ours_in_the_cases_they_fit(command, tmp_path):
    sizes = ("--sizes", "5x7-3", "--sizes", "4x6-5-4-2", "--sizes", "9x8-7")
    code, _, _ = command("--quick", "--dtypes", "fp32", *sizes, "--out", "own.json")
    assert code == 0
    rows = json.loads((tmp_path / "own.json").read_text())["cases"]
    layers = [row["sizes"] for row in rows if row["family"] == "layer"]
    steps = [row["sizes"] for row in rows if row["family"] == "step"]
    assert len(rows) == len(layers) + len(steps)
    assert {tuple(sizes.values()) for sizes in layers} == {(5, 7, 3), (9, 8, 7)}
    assert steps == [{"rows": 4, "in_features": 6, "hidden": [5, 4], "out_features": 2}]


def test_the_page_holds_every_row_and_its_chart(tmp_path):
    times = {OURS: spent(1e-3), "eager <fast>": spent(3e-3), "mm": spent(0.5e-3)}
    facts = {"label": "8 x 16 -> 8", "baseline": "eager <fast>"}
    rows = [finished(planted_case(**facts), times, Settings(), planted_peaks(4e12))]
    results = {
        "schema": 2,
        "environment": machine.environment(Settings()) | {"load_after": 0.5},
        "cases": rows,
        "skipped": ["wide: nothing"],
        "peaks": {"fp32": {"flops_per_second": 4e12, "product": "mm"}},
    }
    html = page(results)
    for text in ("8 x 16 -&gt; 8", "eager &lt;fast&gt; 3.00x, mm 0.50x", "wide: nothing", "4000 GFLOP/s", "50 %"):
        assert text in html
    assert "eager <fast>" not in html
    assert '"x": [3.0]' in html
    assert "say nothing of speed" not in html
    assert "say nothing of speed" in page(results | {"environment": results["environment"] | {"quick": True}})


def test_a_page_without_its_packages_is_refused_before_anything_is_measured(command, monkeypatch):
    monkeypatch.setattr("mlpkit.bench._commands.run", lambda *_: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, out, err = command("tiny", "--quick", "--page", "page.html")
    assert (code, out) == (2, "")
    assert "jinja2" in err


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write({"not": object()}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_list_names_every_family_and_measures_nothing(command):
    code, out, _ = command("--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(cases.FAMILIES)


def test_named_cases_run_once_and_in_the_usual_order():
    assert cases.chosen(["step", "layer", "step"]) == ["layer", "step"]
    assert cases.chosen([]) == list(cases.FAMILIES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("layer", "lyaer"), ("'lyaer'", *cases.FAMILIES)),
        (("--rounds", "6"), ("--rounds is 6", "at least 7")),
        (("--quick", "--rounds", "0"), ("--rounds is 0", "at least 1")),
        (("--threads", "0"), ("--threads is 0",)),
        (("--threads", "100000"), ("--threads is 100000", "cores")),
        (("--threads", "two"), ("--threads", "two")),
        (("--dtypes", "fp32,fp8"), ("--dtypes holds 'fp8'", "bf16")),
        (("--dtypes", ""), ("--dtypes holds ''",)),
        (("--sizes", "784-10"), ("--sizes is '784-10'", "64x784-512-512-10")),
        (("--sizes", "0x784-10"), ("--sizes is '0x784-10'",)),
        (("layer", "--sizes", "8x4-3-2"), ("no --sizes fits the case 'layer'", "step")),
        (("guard", "--sizes", "8x4-3"), ("no --sizes fits the case 'guard'",)),
        (("--page", "."), ("--page .", "directory")),
        (("--out", "."), ("--out .", "directory")),
        (("--out", "/dev/null/results.json"), ("--out /dev/null/results.json",)),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_anything_is_measured(command, monkeypatch, arguments, words):
    monkeypatch.setattr("mlpkit.bench._commands.run", lambda *_: pytest.fail("measured"))
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err


def test_a_family_without_rows_is_reported(command):
    code, _, err = command("wide", "--quick", "--dtypes", "fp16")
    assert code == 0
    assert "skipped: wide" in err


def test_the_table_on_a_terminal_holds_what_the_lines_hold(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    times = {OURS: spent(1e-3), "eager [fast]": spent(3e-3)}
    row = finished(planted_case(label="8 x 16 -> 8"), times, case.Settings(), planted_peaks(4e12))
    with table.choose() as view:
        assert isinstance(view, table.Live)
        view.begin(machine.environment(QUICK))
        view.row(row)
    out = capsys.readouterr().out
    for text in ("8 x 16 -> 8", "1,000 (1,000)", "eager [fast] 3.00x", "50 %"):
        assert text in out
