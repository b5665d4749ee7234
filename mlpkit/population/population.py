"""The population: members over one table, trained side by side and each as if alone."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DeviceError, MlpkitError, ShapeError
from mlpkit.nn import MLP
from mlpkit.population import checkpoint, recipe
from mlpkit.population.data import LOSSES, OF_CLASSES, Table, held_back, inputs, placed, rows_of, table
from mlpkit.population.member import CHANGEABLE, MOST_EPOCHS, Member
from mlpkit.population.progress import watching
from mlpkit.population.scores import Mark, Scores, leaderboard

METRICS = {
    "cross_entropy": ("accuracy",),
    "brier": ("accuracy",),
    "bce": ("accuracy",),
    **dict.fromkeys(("mse", "l1", "huber", "log_mse"), ("r2", "mae", "rmse")),
}
HIGHER_IS_BETTER = ("accuracy", "r2")


class Population:
    """MLPs that may differ in everything, trained over one table.

    members: ``Member`` objects; ids count from 0 and are never reused. X: (rows, in_features) of numbers, kept once as
    float32. y: classes 0, 1, ... of shape (rows,) for ``loss="cross_entropy"`` and "brier" (the squared error of the
    softmax, summed over classes: Brier, 1950); numbers of shape (rows,) or (rows, outputs) for "mse", "l1", "huber"
    (threshold ``delta``) and "log_mse"; numbers in [0, 1] for "bce" on logits. Losses are means over rows and outputs.
    sample_weight: (rows,), what each row counts in losses and metrics.

    metric: "accuracy" for classes, "r2" (mean over outputs), "mae" or "rmse" for numbers; None: the validation loss.
    It decides about the best epoch and patience. validation: what members without ``validation_rows`` are validated
    on: None, nothing; "rest", the rows of X that a member is not trained on; a share such as 0.2 of its rows, which it
    is not trained on then; (X, y) or (X, y, sample_weight), a table of its own. log_target: train on log(y), and
    predict exp of it.

    device: "cpu" or a CUDA device; None: where X lies. On CUDA one block of threads trains a member with its weights
    and activations in shared memory, so that its widths are bounded, and norms are not taken; its numbers are its own
    there too, but not the CPU's, whose sums have another order. What comes back lies on the CPU.

    On the CPU every member is trained by one thread through whole epochs, longest first over ``threads`` threads
    (None: torch's number). A member's numbers depend on its own specification and the data alone: not on threads, order
    or company. Steps in which something is not finite are not taken, but counted; after 8 in a row, or an epoch without
    one that was, the member has diverged and stops, as it does when its validation loss is not finite. progress: show a
    live line.

    Raises MlpkitError subclasses that name the argument, what it was and what it must be.
    """

    def __init__(
        self,
        members: Iterable[Member],
        X: Any,
        y: Any,
        *,
        loss: str,
        metric: str | None = None,
        validation: Any = None,
        device: torch.device | str | None = None,
        threads: int | None = None,
        progress: bool = True,
        sample_weight: Any = None,
        log_target: bool = False,
        delta: float = 1.0,
        out_features: int | None = None,
    ) -> None:
        _check(loss, metric, threads, log_target, delta)
        number, (X, y, sample_weight) = placed(device, X, y, sample_weight)
        self.loss, self.metric, self.threads, self.progress = loss, metric or "loss", threads, progress
        self.log_target, self.delta, self.validation = log_target, float(delta), validation
        self.data = table(X, y, sample_weight, loss, log_target, "Population")
        self.other = self._other_table(validation)
        self.in_features = self.data.x.shape[1]
        self.out_features = _out_features([self.data, *([self.other] if self.other else [])], out_features)
        self.members: dict[int, Member] = {}
        self._marks: dict[int, list[Mark]] = {}
        self._busy = threading.Lock()
        scored = (*self.data, *(self.other or ()))
        try:
            self._native = _C.Population(
                loss=loss,
                delta=self.delta,
                metric=self.metric,
                data=tuple(self.data),
                validation=scored[-4:],
                device=number,
            )
        except NotImplementedError as error:
            reason = str(error).removeprefix("population: ")
            raise DeviceError(f"Population: device is {device or 'cuda'}; {reason}") from error
        self.add(members)

    def _other_table(self, validation: Any) -> Table | None:
        if validation is None or isinstance(validation, str):
            if validation in (None, "rest"):
                return None
            raise ArgumentError(f"Population: validation is {validation!r}; as a word it can only be 'rest'")
        if isinstance(validation, float):
            if 0.0 < validation < 1.0:
                return None
            raise ArgumentError(f"Population: validation is {validation!r}; as a share it must be between 0 and 1")
        if not isinstance(validation, tuple) or len(validation) not in (2, 3):
            raise ArgumentError(
                f"Population: validation is {type(validation).__name__}; it must be None, 'rest', a share, (X, y) or "
                "(X, y, sample_weight)"
            )
        X, y, *weights = validation
        found = table(X, y, weights[0] if weights else None, self.loss, self.log_target, "validation")
        if found.x.shape[1] != self.data.x.shape[1]:
            raise ShapeError(f"validation: X has {found.x.shape[1]} columns, the population {self.data.x.shape[1]}")
        return found

    # Members

    def add(self, members: Iterable[Member]) -> list[int]:
        """New members, with weights drawn from their seeds; returns their ids."""
        new = list(members)
        for member in new:
            if not isinstance(member, Member):
                raise ArgumentError(f"Population: members holds {type(member).__name__}; it must hold Member objects")
        tables: dict[tuple[str, int], Tensor] = {}
        prepared = [(member, *self._tables(member, tables)) for member in new]
        for member, rows, _ in prepared:
            self._refuse_misfits(member, len(rows))
        with self._alone():
            return [self._add_one(*parts) for parts in prepared]

    def _refuse_misfits(self, member: Member, rows: int) -> None:
        network = recipe.network(member, self.in_features, self.out_features)
        reason = self._native.obstacle(network=network, recipe=recipe.recipe(member), rows=rows)
        if reason:
            raise DeviceError(f"Member: {reason}")

    def _add_one(self, member: Member, rows: Tensor, validation_rows: Tensor | None) -> int:
        index: int = self._native.add(
            network=recipe.network(member, self.in_features, self.out_features),
            recipe=recipe.recipe(member),
            rows=rows,
            validation_rows=validation_rows,
        )
        self.members[index] = member
        self._marks[index] = []
        recipe.draw(member, self._native.tensors(index, False))
        return index

    def _tables(self, member: Member, known: dict[tuple[str, int], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Row tables of a member; members that were given the same objects share them."""
        count = len(self.data.x)

        def once(key: str, value: Any, make: Callable[[], Tensor]) -> Tensor:
            if (key, id(value)) not in known:
                known[key, id(value)] = make()
            return known[key, id(value)]

        def every(table: Table) -> Tensor:
            return torch.arange(len(table.x), dtype=torch.int32)

        rows = once(
            "rows",
            member.rows,
            lambda: every(self.data) if member.rows is None else rows_of(member.rows, count, "rows"),
        )
        own, other = member.validation_rows, self.other
        held = None
        if isinstance(self.validation, float) and own is None:
            if ("train", id(member.rows)) not in known:
                parts = held_back(rows, self.validation)
                known["train", id(member.rows)], known["held", id(member.rows)] = parts
            rows, held = known["train", id(member.rows)], known["held", id(member.rows)]
        if member.norm == "batch" and member.hidden and min(len(rows), member.batch_size) == 1:
            raise ArgumentError("Member: norm is 'batch', which needs batches of two rows or more")
        if held is not None:
            return rows, held
        if own is not None:
            if other is not None:
                raise ArgumentError("Member: validation_rows are rows of X; this population has a validation table")
            return rows, once("validation_rows", own, lambda: rows_of(own, count, "validation_rows"))
        if other is not None:
            return rows, once("other", None, lambda: every(other))
        if self.validation == "rest":
            return rows, once("rest", member.rows, lambda: _rest(rows, count))
        if member.patience is not None:
            raise ArgumentError(
                f"Member: patience is {member.patience}, but nothing is validated; give the population a validation, "
                "or the member validation_rows"
            )
        return rows, None

    def drop(self, ids: int | Iterable[int]) -> None:
        """Stop these members; what they have learnt stays."""
        with self._alone():
            for index in self._known(ids):
                self._native.progress(index).status = "dropped"

    def set(self, ids: int | Iterable[int], **hyperparameters: Any) -> None:
        """Change fields of members between increments, such as ``lr``; their curves are marked.

        More ``epochs`` let a member that was done go on; a new ``patience`` one that had lost it.
        Raises ArgumentError for a field that cannot change (see ``Member``; widths, optimizer, seed and rows cannot).
        """
        for name in hyperparameters:
            if name not in CHANGEABLE:
                raise ArgumentError(f"Population.set: {name!r} cannot change; these can: {', '.join(CHANGEABLE)}")
        changed = {index: replace(self.members[index], **hyperparameters) for index in self._known(ids)}
        for index, member in changed.items():
            if (member.momentum > 0) != (self.members[index].momentum > 0):
                raise ArgumentError("Population.set: momentum cannot become 0 or cease to be; its memory is laid out")
            self._refuse_misfits(member, len(self.data.x))
        with self._alone():
            for index, member in changed.items():
                now = self._native.progress(index)
                self.members[index] = member
                self._native.set_recipe(index, recipe.recipe(member))
                self._marks[index].append(Mark(now.epoch, dict(hyperparameters)))
                if now.status == "epochs" and member.epochs > now.epoch:
                    now.status = "alive"
                if now.status == "patience" and "patience" in hyperparameters:
                    now.status, now.waited = "alive", 0

    # Training

    def fit(self, *, directory: str | os.PathLike[str] | None = None, every: int = 1) -> Population:
        """Train every member to its end; with ``directory``, ``save`` there each ``every`` epochs. Returns itself."""
        if directory is None:
            self.train(MOST_EPOCHS)
            return self
        while self.alive:
            self.train(every)
            self.save(directory)
        return self

    def train(self, epochs: int, *, stop: Callable[[], bool] | None = None, longest_first: bool = True) -> int:
        """Up to ``epochs`` more epochs of every member that is alive, none beyond its own last; returns the steps.

        stop: asked ten times a second; once it says True, every member ends the epoch it is in and no more begin, such
        as at a deadline. Who was cut stays alive. longest_first: which members begin first; False: by their ids, so
        that few of them are under way when ``stop`` says so. Ctrl-C lets every member end the epoch it is in, and is
        raised then: the population can go on, or be saved.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ArgumentError(f"Population.train: epochs is {epochs!r}; it must be an int of at least 1")
        ids = self.alive
        with self._alone(), watching(self.progress, len(ids), self.metric) as watch:
            failures: list[BaseException] = []
            cut: list[bool] = []

            def poll(*now: Any) -> bool:
                # An exception may not cross the threads that work: it waits until they have stopped.
                try:
                    watch.update(*now)
                    cut.append(stop is not None and stop())
                except BaseException as error:  # noqa: BLE001
                    failures.append(error)
                return not failures and not any(cut[-1:])

            steps: int = self._native.train(
                ids=ids, epochs=epochs, threads=self._threads(), poll=poll, in_order=not longest_first
            )
            if failures:
                raise failures[0]
        return steps

    @property
    def alive(self) -> list[int]:
        """Ids of the members that ``train`` would train."""
        return [index for index in self.members if self._native.progress(index).status == "alive"]

    @property
    def scores(self) -> dict[int, Scores]:
        """Learning curves and state of every member, by id."""
        return {index: self._scores(index) for index in self.members}

    def _scores(self, index: int) -> Scores:
        now = self._native.progress(index)
        found = now.best_epoch >= 0
        return Scores(
            train_loss=tuple(now.train_loss),
            validation_loss=tuple(now.validation_loss),
            metric=tuple(now.metric),
            lr=tuple(now.lr),
            best_epoch=now.best_epoch if found else None,
            best=now.best if found else None,
            status=now.status,
            cause=now.cause,
            stopped_step=now.stopped_step if now.stopped_step >= 0 else None,
            steps=now.step,
            skipped=now.skipped,
            seconds=now.seconds,
            marks=tuple(self._marks[index]),
        )

    def ranking(self) -> list[int]:
        """Ids of validated members, the best metric first; those that diverged come last."""
        return ranked(self.scores, self.metric)

    def __repr__(self) -> str:
        counts = Counter(score.status for score in self.scores.values())
        states = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        return f"Population({len(self.members)} members{f': {states}' if states else ''})"

    def __str__(self) -> str:
        return leaderboard(self.members, self.scores, self.ranking(), self.metric)

    # What was learnt

    def predict(self, X: Any, *, ids: int | Iterable[int] | None = None, weights: str = "best") -> Tensor:
        """Outputs (members, rows, outputs) float32: logits, or numbers. Members in the order of ``ids`` (None: all).

        weights: "best" are those of a member's best epoch, where it is validated, otherwise and for "last" its last.
        """
        x = inputs(X.cpu() if isinstance(X, Tensor) else X, "Population.predict")
        if x.shape[1] != self.in_features:
            raise ShapeError(f"Population.predict: X has {x.shape[1]} columns; the members take {self.in_features}")
        wanted = list(self.members) if ids is None else self._known(ids)
        if not wanted:
            return torch.empty(0, len(x), self.out_features)
        with self._alone():
            y: Tensor = self._native.predict(ids=wanted, x=x, best=_best(weights), threads=self._threads())
        return y.exp() if self.log_target else y

    def predict_proba(self, X: Any, *, ids: int | Iterable[int] | None = None, weights: str = "best") -> Tensor:
        """Probabilities (members, rows, classes); for "bce" those of each output."""
        if self.loss not in (*OF_CLASSES, "bce"):
            raise ArgumentError(f"Population.predict_proba: the loss is {self.loss}; use predict")
        y = self.predict(X, ids=ids, weights=weights)
        return y.sigmoid() if self.loss == "bce" else y.softmax(-1)

    def export(self, id: int, *, weights: str = "best") -> MLP:
        """The member as an ordinary ``nn.MLP`` in eval mode; its outputs are those of ``predict`` (before exp)."""
        (index,) = self._known(id)
        found = self._native.tensors(index, _best(weights))
        return recipe.module(self.members[index], found, self.in_features, self.out_features)

    # Files

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Everything but the tables into ``directory``: ``population.json`` and a safetensors file that it names.

        A run that is killed while it saves leaves the save before.
        """
        with self._alone():
            checkpoint.write(self, Path(directory))

    @classmethod
    def load(cls, directory: str | os.PathLike[str], X: Any, y: Any, **settings: Any) -> Population:
        """What ``save`` wrote, over the same tables; it goes on bit for bit.

        settings: ``validation`` and ``sample_weight`` as they were, and ``threads`` or ``progress`` as wanted.
        DataError if the directory holds no such population, a damaged one, or one of other data.
        """
        return checkpoint.read(cls, Path(directory), X, y, settings)

    # Parts

    def _known(self, ids: int | Iterable[int]) -> list[int]:
        wanted = [ids] if isinstance(ids, int) else list(ids)
        for index in wanted:
            if index not in self.members:
                raise ArgumentError(
                    f"Population: there is no member {index!r}; ids go from 0 to {len(self.members) - 1}"
                )
        return wanted

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def _alone(self) -> _Alone:
        return _Alone(self._busy)


def ranked(scores: dict[int, Scores], metric: str) -> list[int]:
    """What ``ranking`` returns of these scores."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    found = {index: score for index, score in scores.items() if score.best is not None}
    return sorted(found, key=lambda i: (found[i].status == "diverged", sign * (found[i].best or 0.0), i))


class _Alone:
    """Refuses a second call while one is at work on another thread, or inside a callback."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise MlpkitError("Population: another call is at work on it; wait until it returns")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _check(loss: str, metric: str | None, threads: int | None, log_target: bool, delta: float) -> None:
    if loss not in LOSSES:
        raise ArgumentError(f"Population: loss is {loss!r}; it must be one of {', '.join(LOSSES)}")
    if metric is not None and metric not in ("loss", *METRICS[loss]):
        known = ", ".join(("loss", *METRICS[loss]))
        raise ArgumentError(f"Population: metric is {metric!r}; with {loss} it must be one of {known}, or None")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ArgumentError(f"Population: threads is {threads!r}; it must be an int of at least 1, or None")
    if log_target and loss not in ("mse", "l1", "huber"):
        raise ArgumentError(f"Population: log_target goes with mse, l1 or huber, not with {loss}")
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 < delta < math.inf:
        raise ArgumentError(f"Population: delta is {delta!r}; it must be a finite number above 0")


def _out_features(tables: Sequence[Table], wanted: int | None) -> int:
    if tables[0].target is not None:
        widths = {table.target.shape[1] for table in tables if table.target is not None}
        if len(widths) > 1 or (wanted is not None and {wanted} != widths):
            raise ShapeError(
                f"Population: y has {sorted(widths)} outputs; tables and out_features ({wanted}) must agree"
            )
        return widths.pop()
    found = 1 + max(int(table.classes.max()) for table in tables if table.classes is not None)
    if wanted is not None and wanted < found:
        raise ArgumentError(f"Population: out_features is {wanted}; y has classes up to {found - 1}")
    return wanted or found


def _best(weights: str) -> bool:
    if weights not in ("best", "last"):
        raise ArgumentError(f"Population: weights is {weights!r}; it must be best or last")
    return weights == "best"


def _rest(rows: Tensor, count: int) -> Tensor:
    """The rows of X that are not among these."""
    rest = torch.ones(count, dtype=torch.bool)
    rest[rows.long()] = False
    if not rest.any():
        raise ArgumentError("Population: validation is 'rest', but a member is trained on all rows of X")
    return rest.nonzero()[:, 0].to(torch.int32)
