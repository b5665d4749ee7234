"""``mlpkit trace``: the script runs as python would run it, keeps its exit code and output, and reports are written."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from click.testing import CliRunner

from mlpkit.cli import cli
from mlpkit.errors import DataError

FAILING = """
    import sys
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = torch.log(torch.zeros(2, 4)) if step == 2 else torch.ones(2, 4)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    print("trained", sys.argv[1:], __name__)
"""
MLPKIT = ("-c", "from mlpkit.cli import main; main()")
HEALTHY = "import torch\ntorch.ones(3).sum().item()\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip("\n"))
    return path


def trace(*arguments):
    return CliRunner().invoke(cli, ["trace", *arguments])


def read(folder):
    return json.loads((folder / "diagnosis.json").read_text())


def test_the_first_failure_is_printed_and_written_and_the_script_keeps_its_output(folder):
    write(folder, "train.py", FAILING)
    result = trace("--out", "out", "train.py", "--epochs", "3", "-x")
    assert result.exit_code == 0
    assert result.stdout == "trained ['--epochs', '3', '-x'] __main__\n"
    found = read(folder / "out")
    assert (found["schema_version"], found["verdict"], found["step"], found["op"]) == (1, "failure", 2, "log")
    assert (found["phase"], found["module"], found["cause"], found["location"]) == (
        "forward",
        "",
        "log_of_zero",
        "train.py:7",
    )
    assert result.stderr.splitlines()[0] == f"mlpkit: {found['sentence']}"
    assert "<html" in (folder / "out" / "report.html").read_text()
    written = ["bundle.mlpk", "diagnosis.json", "report.html"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == written


def test_reports_go_to_the_current_folder_by_default(folder):
    write(folder, "fine.py", HEALTHY)
    assert trace("fine.py").exit_code == 0
    assert read(folder)["verdict"] == "healthy"
    assert (folder / "report.html").exists()


def test_argv_path_and_file_are_those_of_python(folder):
    write(folder, "pkg/beside.py", "VALUE = 5")
    text = "import sys, beside\nprint(sys.argv[0], sys.path[0] == {0!r}, __file__ == {1!r}, beside.VALUE)"
    script = folder / "pkg" / "main.py"
    script.write_text(text.format(str(folder / "pkg"), str(script)))
    before = (list(sys.argv), list(sys.path))
    result = trace("pkg/main.py")
    assert result.stdout == "pkg/main.py True True 5\n"
    assert (sys.argv, sys.path) == before
    sys.modules.pop("beside")


def test_a_module_runs_with_dash_m(folder):
    write(folder, "package/__init__.py", "")
    write(folder, "package/job.py", "import sys\nfrom package import __name__ as n\nprint(n, __name__, sys.argv[1:])")
    result = trace("-m", "package.job", "a")
    assert result.stdout == "package __main__ ['a']\n"
    assert result.exit_code == 0
    sys.modules.pop("package")


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(7)", 7), ("sys.exit('no data')", 1), ("raise ValueError", 1)],
)
def test_the_exit_code_is_the_scripts_own(folder, ending, code):
    write(folder, "ends.py", f"import sys\n{ending}")
    result = trace("ends.py")
    assert result.exit_code == code
    assert read(folder)["verdict"] == "healthy"
    assert ("no data" in result.stderr) == ("no data" in ending)


ENDLESS = """
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = 0
    while step < 100_000:
        x = torch.log(torch.zeros(2, 4)) if step == 2 else torch.ones(2, 4)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        step += 1
        open("steps", "w").write(str(step))
"""


WORKERS = """
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            row = torch.ones(4)
            return torch.log(row * 0) if i == 20 else row

    if __name__ == "__main__":
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in DataLoader(Rows(), batch_size=8, num_workers=2):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        print("trained")
"""


def test_a_bad_row_from_a_worker_process_is_named_at_the_step_that_met_it(folder):
    write(folder, "train.py", WORKERS)
    run = subprocess.run(
        [sys.executable, *MLPKIT, "trace", "train.py"], capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "trained\n"), run.stderr
    found = read(folder)
    assert (found["verdict"], found["step"], found["cause"]) == ("failure", 2, "external")


@pytest.mark.parametrize("level", ["observe", "watch"])
def test_stop_at_first_ends_the_script_after_the_step_that_failed_and_writes_the_reports(folder, level):
    write(folder, "train.py", ENDLESS)
    run = subprocess.run(
        [sys.executable, *MLPKIT, "trace", "--level", level, "--stop-at-first", "--out", "out", "train.py"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 3, run.stderr
    assert "Traceback" not in run.stderr
    assert int((folder / "steps").read_text()) in (2, 3, 4)
    found = read(folder / "out")
    assert (found["verdict"], found["step"]) == ("failure", 2)
    assert "Infinity" not in (folder / "out" / "report.html").read_text()


def test_stop_at_first_leaves_a_healthy_script_alone(folder):
    write(folder, "train.py", FAILING.replace("step == 2", "step == 9"))
    result = trace("--stop-at-first", "train.py")
    assert (result.exit_code, result.stdout) == (0, "trained [] __main__\n")


def test_fail_on_failure_exits_with_three(folder):
    write(folder, "train.py", FAILING)
    write(folder, "fine.py", HEALTHY)
    assert trace("--fail-on", "failure", "train.py").exit_code == 3
    assert trace("--fail-on", "failure", "fine.py").exit_code == 0
    assert trace("train.py").exit_code == 0


@pytest.mark.parametrize("arguments", [("nothing.py",), ("-m", "no.such.module"), ("folder",), ("-m", "folder")])
def test_what_cannot_be_run_is_refused_in_one_sentence(folder, arguments):
    (folder / "folder").mkdir()
    with pytest.raises(DataError, match=r"^trace: [^\n]*$"):
        CliRunner().invoke(cli, ["trace", *arguments], catch_exceptions=False)
    assert not (folder / "diagnosis.json").exists()


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)


def test_a_script_that_does_not_exist_ends_with_two(folder):
    result = run(*MLPKIT, "trace", "nothing.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "mlpkit: trace: there is no script 'nothing.py'\n"


def test_a_script_that_raises_shows_the_traceback_python_shows(folder):
    write(
        folder,
        "raises.py",
        """
        import torch

        def multiply(a):
            try:
                return a @ torch.zeros(2, 3)
            except RuntimeError as error:
                raise ValueError("cannot multiply") from error

        multiply(torch.zeros(2, 3))
        """,
    )
    plain, traced = run("raises.py"), run(*MLPKIT, "trace", "raises.py")
    assert plain.returncode == traced.returncode == 1
    assert traced.stderr.startswith(plain.stderr)
    assert traced.stderr.removeprefix(plain.stderr).startswith("mlpkit: No failure")
    assert (folder / "report.html").exists()


def test_a_missing_extra_is_said_and_the_diagnosis_is_still_written(folder, monkeypatch):
    write(folder, "fine.py", HEALTHY)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = trace("fine.py")
    assert result.exit_code == 0
    assert 'pip install "mlpkit[report]"' in result.stderr
    assert read(folder)["verdict"] == "healthy"
    assert not (folder / "report.html").exists()


def test_reports_go_where_they_were_asked_for_though_the_script_changes_directory(folder):
    write(folder, "moves.py", f"import os\nos.mkdir('away')\nos.chdir('away')\n{HEALTHY}")
    assert trace("--out", "out", "moves.py").exit_code == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["diagnosis.json", "report.html"]
    assert list((folder / "away").iterdir()) == []


@pytest.mark.parametrize("out", ["fine.py", "fine.py/deep/er"])
def test_an_out_that_is_a_file_or_lies_below_one_is_refused_before_the_script_runs(folder, out):
    write(folder, "fine.py", "print('ran')")
    result = run(*MLPKIT, "trace", "--out", out, "fine.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "mlpkit: trace: --out: fine.py is a file; a folder is wanted\n"


def test_a_report_that_cannot_be_written_is_one_sentence_after_the_diagnosis(folder):
    write(folder, "fine.py", HEALTHY)
    (folder / "report.html" / "taken").mkdir(parents=True)
    result = run(*MLPKIT, "trace", "fine.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0].startswith("mlpkit: No failure in 1 step")
    assert result.stderr.splitlines()[1:] == [f"mlpkit: cannot write {folder / 'report.html'}: Is a directory"]
    assert sorted(path.name for path in folder.iterdir()) == ["diagnosis.json", "fine.py", "report.html"]


RANKS = """
    import os
    import torch
    from torch.nn.parallel import DistributedDataParallel

    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x = torch.ones(2, 4)
        if rank == 1 and step == 1:
            x = torch.log(x - 2)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    torch.distributed.destroy_process_group()
"""


def test_of_two_ranks_each_says_who_it_is_and_the_guilty_one_names_the_operation(folder):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    write(folder, "ranks.py", RANKS)
    command = [sys.executable, *MLPKIT, "trace", "--out", "out", "ranks.py"]
    started = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        )
        for rank in "01"
    ]
    said = [one.communicate(timeout=300)[1] for one in started]
    assert [one.returncode for one in started] == [0, 0], "\n".join(said)
    innocent, guilty = (json.loads((folder / "out" / f"rank{rank}" / "diagnosis.json").read_text()) for rank in "01")
    assert "mlpkit, rank 1: Step 1, forward (ranks.py:13): log in float32 gave NaN" in said[1]
    assert (guilty["op"], guilty["step"], guilty["phase"], guilty["cause"]) == ("log", 1, "forward", "domain")
    assert "mlpkit, rank 0: " in said[0]
    assert innocent["phase"] != "forward"
    assert innocent["op"] != "log"


def test_under_torchrun_the_guilty_rank_names_its_operation(folder):
    write(folder, "ranks.py", RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    run = subprocess.run(
        [*launcher, sys.executable, *MLPKIT, "trace", "--out", "out", "ranks.py"],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    guilty, other = (read(folder / "out" / f"rank{rank}") for rank in (1, 0))
    assert (guilty["verdict"], guilty["step"], guilty["op"]) == ("failure", 1, "log")
    assert (other["verdict"], other["step"]) == ("failure", 1)
    assert other["op"] != "log"
    assert "mlpkit, rank 1: " in run.stderr
