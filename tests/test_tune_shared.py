"""Workers that share a search: one table whoever trained what, nothing trained twice, claims of the dead set free."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlpkit import cli
from mlpkit.errors import ArgumentError, DataError
from mlpkit.tune import shared, tune
from mlpkit.tune.shared import hidden

SECRET = "s3cr et"


def table(rows=60):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=rows), "b": rng.normal(size=rows)})
    return frame.assign(label=np.where(frame["a"] * frame["b"] > 0, "yes", "no"))


def search(**more):
    return tune(
        table(), "label", strategy="random", budget="10 trials", cv=2, random_state=3, progress=False,
        space={"epochs": 5, "layers": [0, 1], "width": [8, 16], "lr": (1e-3, 1e-1)}, **more,
    )  # fmt: skip


def told(run):
    return [(trial.name, trial.params, trial.scores) for trial in run.trials]


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
import test_tune_shared as own
from mlpkit.tune import shared, trainer
shared._HEARTBEAT, shared._GRACE = 1, 2
shared.socket.gethostname = lambda: {host!r}
train, calls = trainer.train_members, []
def slow(*given, **more):
    calls.append(0)
    if len(calls) == {hang_at}:
        print("hanging", flush=True)
        time.sleep(120)
    return train(*given, **more)
trainer.train_members = slow
own.search(storage={storage!r}, study="s")
print("done", flush=True)
"""


def worker(storage, hang_at=0, host="elsewhere"):
    code = WORKER.format(tests=str(Path(__file__).parent), storage=storage, hang_at=hang_at, host=host)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def postgresql(tmp_path):
    """The URL of a server of our own on loopback; it ends with the test."""
    binaries = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    if not any(binaries):
        pytest.skip("no PostgreSQL server is installed (initdb not found)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    programs = Path(os.path.realpath(next(item for item in binaries if item))).parent
    as_user = []
    if os.getuid() == 0:  # The server refuses to run as root.
        if shutil.which("setpriv") is None:
            pytest.skip("the server does not run as root, and there is no setpriv")
        as_user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = Path("/tmp") / f"mlpkit-pg-{os.getpid()}-{port}"
    home.mkdir()
    try:
        (home / "password").write_text(SECRET)
        if as_user:
            for item in (home, home / "password"):
                os.chown(item, 65534, 65534)
        data = str(home / "data")
        made = [programs / "initdb", "-D", data, "-U", "me", "-A", "scram-sha-256", "--pwfile", home / "password", "-N"]
        subprocess.run([*as_user, *made], check=True, capture_output=True, cwd="/")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c fsync=off"
        control = [*as_user, programs / "pg_ctl", "-D", data, "-w", "-l", str(home / "log")]
        subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True, cwd="/")
        try:
            yield f"postgresql://me:{SECRET.replace(' ', '%20')}@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def pieces(storage):
    """(key, state) of every piece of work in the study."""
    import optuna

    url = storage.replace("postgresql://", "postgresql+psycopg://")
    backend = optuna.storages.journal
    store = url if "://" in url else optuna.storages.JournalStorage(backend.JournalFileBackend(url))
    study = optuna.load_study(study_name="s", storage=store)
    found = [(trial.user_attrs["key"], trial.state.name, trial.user_attrs["worker"]) for trial in study.get_trials()]
    if "://" in url:
        study._storage.remove_session()
        study._storage._backend.engine.dispose()
    return found


def survives_a_kill(storage, host):
    alone = told(search())
    with worker(storage, hang_at=3, host=host) as other:
        assert other.stdout.readline() == "hanging\n"  # It holds a claim that it will never fulfil.
        other.kill()
    run = search(storage=storage, study="s")
    assert told(run) == alone
    found = pieces(storage)
    done = [key for key, state, _ in found if state == "COMPLETE"]
    assert len(done) == len(set(done))
    assert {own.split(":")[0] for _, state, own in found if state == "COMPLETE"} == {host, socket.gethostname()}
    before = len(found)
    assert told(search(storage=storage, study="s")) == alone  # All is known by now.
    assert len(pieces(storage)) == before


def test_a_killed_worker_on_this_host_loses_its_claims_to_the_others(tmp_path):
    storage = str(tmp_path / "shared.log")
    survives_a_kill(storage, socket.gethostname())


def test_a_killed_worker_elsewhere_is_noticed_by_a_real_server(postgresql, monkeypatch):
    monkeypatch.setattr(shared, "_HEARTBEAT", 1)
    monkeypatch.setattr(shared, "_GRACE", 2)
    survives_a_kill(postgresql, "elsewhere")


def test_workers_at_the_same_time_share_the_work(tmp_path):
    storage = str(tmp_path / "shared.log")
    other = worker(storage, host=socket.gethostname())
    run = search(storage=storage, study="s")
    assert other.communicate(timeout=400)[0] == "done\n"
    assert told(run) == told(search())
    done = [key for key, state, _ in pieces(storage) if state == "COMPLETE"]
    assert len(done) == len(set(done))


def test_another_search_under_the_same_name_is_refused(tmp_path):
    storage = str(tmp_path / "shared.log")
    search(storage=storage, study="s")
    with pytest.raises(ArgumentError, match=r"study: 's' is of another search \(different: settings\)"):
        tune(table(), "label", strategy="grid", budget="1 trials", random_state=3, storage=storage, study="s")


def test_a_storage_needs_a_name():
    with pytest.raises(ArgumentError, match="go together"):
        tune(table(), "label", storage="x.log")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("postgresql://me:pw@host/base", "postgresql://me:***@host/base"),
        ("mlpkit tune --storage 'postgresql://me:p@ss/w:d@host/base' --study s", None),
        ("postgresql://host/base?user=me&password=pw&x=1", "postgresql://host/base?user=me&password=***&x=1"),
        ("no url", "no url"),
    ],
)
def test_passwords_are_hidden(text, wanted):
    assert hidden(text) == (wanted or "mlpkit tune --storage 'postgresql://me:***@host/base' --study s")


@pytest.mark.parametrize("url", ["postgresql://me:hush@127.0.0.1:1/base", "nosuch://me:hush@x/y"])
def test_no_error_holds_the_password(url, monkeypatch, capsys, tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(DataError, match=r"storage: cannot open .*\*\*\*") as error:
        search(storage=url, study="s")
    assert "hush" not in str(error.value)
    assert error.value.__cause__ is None
    table().to_csv(tmp_path / "t.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlpkit", "tune", "t.csv", "--target", "label", "--storage", url, "--study", "s"])
    with pytest.raises(SystemExit):
        cli.main()
    written = "".join(capsys.readouterr())
    assert "storage: cannot open" in written
    assert "hush" not in written


def test_no_report_holds_the_password(monkeypatch, capsys, tmp_path):
    table().to_csv(tmp_path / "t.csv", index=False)
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/s.db?password=hush"
    monkeypatch.setattr(shared.Shared, "_open", lambda self, storage: _journal(tmp_path))
    words = ["tune", "t.csv", "--target", "label", "--budget", "1trials", "--cv", "2", "--out", "run"]
    monkeypatch.setattr(sys, "argv", ["mlpkit", *words, "--storage", url, "--study", "s"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "password=***" in (tmp_path / "run" / "report.json").read_text()
    for file in (tmp_path / "run").iterdir():
        assert b"hush" not in file.read_bytes()
    assert "hush" not in "".join(capsys.readouterr())


def _journal(folder):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(folder / "j.log")))
