"""``tune``: a table and a target in, a Run out. Encodes every fold once, climbs the ladder, refits the winner."""

from __future__ import annotations

import math
import os
import secrets
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.report._extras import require
from mlpkit.tune import progress as speak
from mlpkit.tune import rundir, trainer
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.folds import Fold, make_folds
from mlpkit.tune.ladder import Climb, Hidden, Trial, climb
from mlpkit.tune.model import TunedModel
from mlpkit.tune.problem import Problem, encode_fold, read_problem, target_scale, target_tensor
from mlpkit.tune.run import Run
from mlpkit.tune.study import to_study
from mlpkit.tune.verdicts import judge

STRATEGIES = ("auto", "constructive")

_LR = 6e-3
_WEIGHT_DECAY = 0.3  # AdamW's: the weights shrink by lr * weight_decay = 0.18 % a step.
_WRAP_UP_SECONDS = 0.5


def tune(
    X: Any,
    y: Any,
    *,
    strategy: str = "auto",
    budget: float = 120.0,
    cv: int = 5,
    random_state: int | None = None,
    out: str | os.PathLike[str] | None = None,
    task: str = "auto",
    categorical: Collection[str] = (),
    ignore: Collection[str] = (),
    overwrite: bool = False,
    progress: bool | None = None,
    command: str | None = None,
) -> Run:
    """Find the simplest MLP that a table deserves, from no hidden layer upwards, and fit it.

    X: array, DataFrame or anything pandas takes; y: a column of equal length, or the name of a column of X.
    strategy: "auto" or "constructive", both the ladder of 0, 1 and 2 hidden layers. budget: seconds of wall time; the
    linear baseline always finishes, other candidates only if they fit. cv: folds. random_state: a whole number, or
    None for a drawn one (the run records it). out: a run directory to write (see ``Run.save``). task:
    "classification", "regression" or "auto". categorical, ignore: names of columns. progress: True or None shows it on
    stderr, False is silent. Same table, seed and versions give the same scores, unless the budget cut the search short.

    Raises DataError for a table, ArgumentError for an argument that cannot be used. Torch's and NumPy's global
    generators are left as they were.
    """
    start = time.perf_counter()
    _check(strategy, budget, cv, random_state)
    # What is only needed at the end is looked for now, not after minutes of training.
    for module in ("pandas", "optuna", *(("safetensors", "jinja2", "plotly") if out is not None else ())):
        require(module, "mlpkit.tune")
    target_path = rundir.check(out, overwrite) if out is not None else None
    seed = secrets.randbelow(2**31) if random_state is None else int(random_state)
    problem = read_problem(X, y, task, cv, categorical, ignore)
    metric = "accuracy" if problem.target.task == "classification" else "R2"
    with speak.choose(progress, metric, cv) as say, _one_thread():
        say.note(_opening(problem, cv, seed))
        for note in problem.notes:
            say.note(f"note: {note}")
        folds = make_folds(problem.target.values, cv, seed, stratify=problem.target.task == "classification")
        result = _Search(problem, folds, seed, start, budget, say).climb()
        say.note(f"refitting {result.winner.words} on all {problem.rows} rows")
        model, epochs = _refit(problem, result.winner, seed)
    run = Run(
        estimator=model,
        verdicts=judge(result, metric, _floor(problem, folds)),
        climb=result,
        study=to_study(result, metric, seed),
        folds=folds,
        metric=metric,
        settings={"strategy": strategy, "budget": budget, "cv": cv, "seed": seed, "epochs_of_refit": epochs},
        data={
            "rows": problem.rows, "sha256": problem.fingerprint, "notes": problem.notes,
            "features": len(model.encoder.feature_names),
        },
        command=command,
        seconds=time.perf_counter() - start,
    )  # fmt: skip
    if target_path is not None:
        run.save(target_path, overwrite=overwrite)
    return run


class _Search:
    """Runs candidates of the ladder against the clock."""

    def __init__(
        self, problem: Problem, folds: Sequence[Fold], seed: int, start: float, budget: float, say: speak.Silent
    ) -> None:
        self.seed, self.say, self.rows = seed, say, len(folds[0].train)
        self.out_features = len(problem.target.classes)
        self.folds = [encode_fold(problem, fold) for fold in folds]
        self.end = start + budget
        self.slowest = self.latest = 0.0

    def climb(self) -> Climb:
        return climb(self.run)

    def run(self, hidden: Hidden) -> Trial | None:
        linear = not hidden
        # What remains after the winner's refit on all rows, which costs a little more than one of its folds.
        deadline = self.end - 1.5 * self.slowest / len(self.folds) - _WRAP_UP_SECONDS
        if not linear and time.perf_counter() + 0.7 * self.latest > deadline:
            return None
        self.say.start(hidden)
        spec = make_spec(hidden, self.rows, self.seed)
        if linear:
            # The baseline may use half of what there is and keeps its best weights at that point.
            now = time.perf_counter()
            deadline = now + max(deadline - now, 0.0) / 2
        outcomes = trainer.train_members(
            [spec], self.folds, self.out_features, deadline=deadline, keep_at_deadline=linear,
            on_fold=lambda _spec, _fold, outcome: self.say.fold(outcome),
        )[0]  # fmt: skip
        in_features = self.folds[0].train.x.shape[1]
        trial = Trial(hidden, _parameters(in_features, hidden, max(1, self.out_features)), outcomes, _state(outcomes))
        if linear and trial.state != "complete":
            raise NonFiniteError("tune: the loss of the linear model became non-finite; look for extreme values")
        self.latest, self.slowest = trial.seconds, max(self.slowest, trial.seconds)
        self.say.done(trial)
        return trial


def make_spec(hidden: Hidden, rows: int, seed: int) -> trainer.Spec:
    """How a candidate is trained: about 24 batches an epoch, between 32 and 256 rows each."""
    batch = min(256, max(32, 2 ** round(math.log2(max(1, rows / 24)))))
    return trainer.Spec(hidden, lr=_LR, weight_decay=_WEIGHT_DECAY, batch_size=batch, seed=seed)


def _refit(problem: Problem, winner: Trial, seed: int) -> tuple[TunedModel, int]:
    every = np.arange(problem.rows)
    encoder = Encoder.fit(problem.data, problem.columns, every)
    mean, scale = target_scale(problem.target, every)
    split = trainer.Split(torch.from_numpy(encoder.transform(problem.data)), target_tensor(problem.target, mean, scale))
    epochs = round(statistics.median(outcome.best_epoch for outcome in winner.outcomes)) + 1
    spec = make_spec(winner.hidden, problem.rows, seed)
    network = trainer.refit(spec, split, len(problem.target.classes), epochs)
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise NonFiniteError("tune: the weights became non-finite in the fit on all rows")
    model = TunedModel(
        model=network, task=problem.target.task, target_name=problem.target.name, classes=problem.target.classes,
        columns=problem.columns, encoder=encoder, hidden=winner.hidden, activation=spec.activation,
        target_mean=mean, target_scale=scale,
    )  # fmt: skip
    return model, epochs


def _check(strategy: str, budget: float, cv: int, random_state: int | None) -> None:
    if strategy not in STRATEGIES:
        raise ArgumentError(f"tune: strategy is {strategy!r}, must be one of {', '.join(STRATEGIES)}")
    if not (isinstance(budget, int | float) and math.isfinite(budget) and budget > 0):
        raise ArgumentError(f"tune: budget is {budget!r}, must be a positive number of seconds")
    if not isinstance(cv, int) or isinstance(cv, bool) or not 2 <= cv <= 20:
        raise ArgumentError(f"tune: cv is {cv!r}, must be a whole number of folds from 2 to 20")
    whole = isinstance(random_state, int | np.integer) and not isinstance(random_state, bool)
    if random_state is not None and not (whole and 0 <= random_state < 2**32):
        raise ArgumentError(f"tune: random_state is {random_state!r}, must be None or a whole number below 2**32")


def _floor(problem: Problem, folds: Sequence[Fold]) -> float:
    """What a constant guess scores: the largest class, or the mean (R2 of 0)."""
    if problem.target.task == "regression":
        return 0.0
    return float(np.bincount(problem.target.values).max()) / problem.rows


def _state(outcomes: Sequence[trainer.Outcome]) -> Any:
    if all(outcome.finished for outcome in outcomes):
        return "complete"
    return "diverged" if outcomes[-1].stopped == "diverged" else "out of time"


def _parameters(in_features: int, hidden: Hidden, out_features: int) -> int:
    sizes = [in_features, *hidden, out_features]
    return sum((before + 1) * after for before, after in pairwise(sizes))


def _opening(problem: Problem, cv: int, seed: int) -> str:
    target = problem.target
    what = f"{len(target.classes)} classes" if target.task == "classification" else "a regression"
    columns = "1 column" if len(problem.columns) == 1 else f"{len(problem.columns)} columns"
    return f"{target.name}: {what}, {problem.rows} rows, {columns}; {cv} folds, seed {seed}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers of a few hundred units are slower on two threads than on one, and one gives the same sums anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
