"""Several workers on one search: what is to be trained is claimed, and outcomes are shared, in an Optuna storage."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import numpy as np

from mlpkit.errors import ArgumentError, DataError
from mlpkit.report._extras import require
from mlpkit.tune.journal import Journal, Work, key_of, plain_of
from mlpkit.tune.study import quiet
from mlpkit.tune.trainer import Outcome

_CLAIM = 4  # Pieces of work taken at a time: few, so that the end of a batch is shared too.
_HEARTBEAT = 3
_GRACE = 10
_POLL = 0.2
_SECRET = re.compile(r"(://[^:/@\s]*:)(\S*)(@)")
_QUERY = re.compile(r"(password=)([^&\s'\"]*)", re.IGNORECASE)


def hidden(text: str) -> str:
    """``text`` with the password of every URL in it replaced by three stars."""
    return _QUERY.sub(r"\1***", _SECRET.sub(r"\1***\3", text))


class Shared(Journal):
    """A Journal that workers on one or many hosts write into together: an Optuna study, one trial a piece of work.

    storage: "postgresql://user:password@host/base" or another URL of SQLAlchemy, or the path of a journal file for
    workers on one host. name: of the study. Workers must search the same table with the same settings and seed; each
    proposes the same candidates and trains those that nobody else has claimed. A claim whose worker is gone, by
    Optuna's heartbeat or on one host by its process, is free again. The password is in no message.
    """

    def __init__(self, storage: str, name: str, header: dict[str, Any]) -> None:
        super().__init__()
        self._optuna = require("optuna", "mlpkit.tune")
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._mine: dict[str, int] = {}
        self._stop = threading.Event()
        with _no_secret(storage), quiet(self._optuna):
            self._storage = self._open(storage)
            study = self._optuna.create_study(
                storage=self._storage, study_name=name, direction="maximize", load_if_exists=True
            )
            self._study = study
            self._id: int = self._storage.get_study_id_from_name(name)
            before = study.user_attrs.get("mlpkit")
            if before is None:
                study.set_user_attr("mlpkit", header)
            elif before != header:
                different = ", ".join(sorted(key for key in header if header[key] != before.get(key)))
                raise ArgumentError(
                    f"study: {name!r} is of another search (different: {different}); choose another name"
                )
            self._refresh()
        self.resumed = len(self._known)
        self.credits = False  # What others trained costs this worker no time.
        self._beating = hasattr(self._storage, "record_heartbeat")
        if self._beating:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def take(self, wanted: Sequence[Work]) -> list[int]:
        """Numbers of the pieces that nobody has and that are now this worker's, few at a time."""
        self._refresh()
        taken: list[int] = []
        for number, work in enumerate(wanted):
            key = key_of(*work)
            if key not in self._known and self._claim(key, work):
                taken.append(number)
            if len(taken) == _CLAIM:
                break
        return taken

    def wait(self) -> None:
        """Until others may have got further."""
        time.sleep(_POLL)
        self._refresh()

    def add(self, work: Work, outcomes: Sequence[Outcome]) -> None:
        """Hand in what was claimed; what the clock cut is given back."""
        key = key_of(*work)
        number = self._mine.pop(key, None)
        if number is None:
            return
        states = self._optuna.trial.TrialState
        if not outcomes or any(item.stopped in ("clock", "not started") for item in outcomes):
            self._storage.set_trial_state_values(number, states.FAIL)
            return
        plain = [plain_of(outcome) for outcome in outcomes]
        scores = [outcome.score for outcome in outcomes if outcome.finished]
        self._known[key] = plain
        self._storage.set_trial_user_attr(number, "outcomes", plain)
        self._storage.set_trial_state_values(number, states.COMPLETE, [float(np.mean(scores)) if scores else -1e9])

    def close(self) -> None:
        """Give back what is still claimed, and the connections."""
        self._stop.set()
        for number in self._mine.values():
            self._storage.set_trial_state_values(number, self._optuna.trial.TrialState.FAIL)
        self._mine.clear()
        if self._beating:
            self._thread.join()
            self._storage.remove_session()
            getattr(self._storage, "_backend", self._storage).engine.dispose()

    def _open(self, storage: str) -> Any:
        storages = self._optuna.storages
        if "://" not in storage:
            backend = storages.journal
            return storages.JournalStorage(backend.JournalFileBackend(storage))
        url = storage
        if url.startswith(("postgresql://", "postgres://")):
            driver = "psycopg2" if _installed("psycopg2") else "psycopg"
            require(driver, "a PostgreSQL storage", "postgresql")
            url = f"postgresql+{driver}://" + url.split("://", 1)[1]
        with self._experimental():
            return storages.get_storage(storages.RDBStorage(url, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE))

    @contextmanager
    def _experimental(self) -> Iterator[None]:
        """Optuna warns at every use of its heartbeat that the interface may change."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            yield

    def _claim(self, key: str, work: Work) -> bool:
        if self._live(key):
            return False
        optuna, (spec, _, mark, first) = self._optuna, work
        attrs = {"key": key, "worker": self._worker, "mark": mark, "first_fold": first}
        shape = {"layers": len(spec.hidden), "width": max(spec.hidden, default=0), "lr": spec.lr}
        kinds = optuna.distributions
        template = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, user_attrs=attrs, params=shape,
            distributions={
                "layers": kinds.IntDistribution(0, 100), "width": kinds.IntDistribution(0, 2**20),
                "lr": kinds.FloatDistribution(1e-12, 1e3, log=True),
            },
        )  # fmt: skip
        number = self._storage.create_new_trial(self._id, template_trial=template)
        if self._beating:
            self._storage.record_heartbeat(number)
        # Two may have claimed it at once: the earlier one has it. Or it was done after the last look.
        self._refresh()
        if key in self._known or min(trial._trial_id for trial in self._live(key)) != number:
            self._storage.set_trial_state_values(number, optuna.trial.TrialState.FAIL)
            return False
        self._mine[key] = number
        return True

    def _live(self, key: str) -> list[Any]:
        """Claims on a piece of work whose workers are not known to be gone."""
        running = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,))
        return [trial for trial in running if trial.user_attrs.get("key") == key and not self._gone(trial)]

    def _gone(self, trial: Any) -> bool:
        """True on one host if the process of a claim no longer runs; other hosts have the heartbeat."""
        host, _, process = str(trial.user_attrs.get("worker", "")).rpartition(":")
        if host != socket.gethostname() or not process.isdigit():
            return False
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _refresh(self) -> None:
        if hasattr(self._storage, "record_heartbeat"):
            with self._experimental():
                self._optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,)):
            key = trial.user_attrs.get("key")
            if key is not None and key not in self._known and "outcomes" in trial.user_attrs:
                self._known[key] = trial.user_attrs["outcomes"]

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT):
            for number in list(self._mine.values()):
                self._storage.record_heartbeat(number)
        self._storage.remove_session()


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


@contextmanager
def _no_secret(storage: str) -> Iterator[None]:
    """Errors of a storage in one sentence that does not hold its password."""
    try:
        yield
    except (ArgumentError, DataError):
        raise
    except Exception as error:
        from mlpkit.errors import MlpkitError

        if isinstance(error, MlpkitError):
            raise
        words = hidden((str(error).strip() or type(error).__name__).splitlines()[0])
        for found in (_SECRET.search(storage), _QUERY.search(storage)):
            for secret in {found.group(2), unquote(found.group(2))} - {""} if found else set():
                words = words.replace(secret, "***")
        raise DataError(f"storage: cannot open {hidden(storage)}: {words}") from None
