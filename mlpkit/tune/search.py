"""``tune``: a table and a target in, a Run out. Checks, searches, judges, and puts the Run together."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpkit.errors import ArgumentError
from mlpkit.report._extras import require
from mlpkit.tune import large, rundir
from mlpkit.tune import progress as speak
from mlpkit.tune.budget import Clock, read_budget
from mlpkit.tune.ensemble import Committee, choose
from mlpkit.tune.evaluate import Search
from mlpkit.tune.final import estimate, fit
from mlpkit.tune.folds import make_folds
from mlpkit.tune.honest import Estimate
from mlpkit.tune.journal import Journal, header_of
from mlpkit.tune.ladder import Climb, from_trials
from mlpkit.tune.model import TunedModel
from mlpkit.tune.plain import versions
from mlpkit.tune.problem import Problem, read_problem
from mlpkit.tune.run import Run
from mlpkit.tune.space import Space, widths
from mlpkit.tune.study import to_study
from mlpkit.tune.verdicts import judge

STRATEGIES = (
    "auto", "constructive", "grid", "random", "quasirandom", "coarse_to_fine", "bayes", "sequential",
)  # fmt: skip
_FITS_OF_AN_AVERAGE = 5  # What the clock sets aside for the networks of an average, each fitted on all rows.


def tune(
    X: Any,
    y: Any,
    *,
    strategy: str = "auto",
    budget: float | str = 120.0,
    cv: int = 5,
    random_state: int | None = None,
    out: str | os.PathLike[str] | None = None,
    space: Space | Mapping[str, Any] | None = None,
    groups: Any = None,
    time: Any = None,
    sample_weight: Any = None,
    test: tuple[Any, Any] | None = None,
    ensemble: bool | None = None,
    resume: bool = True,
    storage: str | None = None,
    study: str | None = None,
    task: str = "auto",
    categorical: Collection[str] = (),
    ignore: Collection[str] = (),
    overwrite: bool = False,
    progress: bool | None = None,
    command: str | None = None,
) -> Run:
    """Find the simplest MLP that a table deserves, from no hidden layer upwards, and fit it.

    X: array, DataFrame or anything pandas takes; y: a column of equal length, or the name of a column of X.
    strategy: "auto", or one of "constructive" (the ladder of layers), "grid", "random", "quasirandom",
    "coarse_to_fine", "bayes", "sequential". budget: seconds of wall time, or a text such as "90s", "60 cpu-s",
    "200 trials"; the linear baseline always finishes, other candidates only if they fit. cv: folds. random_state: a
    whole number, or None for a drawn one (the run records it). out: a run directory to write (see ``Run.save``).
    space: a ``Space``, or its parts by name. groups: a value per row, or the name of a column; rows of one group share
    a fold. time: the same; a fold learns only from rows before those it is tested on. sample_weight: a weight per row.
    test: (X, y), scored once, by the final model. ensemble: True predicts with an average of finalists where that is
    better by one standard error, False with the winner alone, None is True for "auto" only. resume: go on with a run
    into ``out`` that was killed. storage, study: work on the named study together with others, see
    ``mlpkit.tune.shared``; without random_state the seed then follows from the table and the name.
    task: "classification", "regression" or "auto". categorical, ignore: names of columns. progress: True or None shows
    it on stderr, False is silent. Same table, seed and versions give the same scores, unless the budget, being a time,
    cut the search short.

    Above 200,000 rows the search sees a sample of 40,000, drawn evenly over the target, in half of the budget; the
    winner is then judged on 20,000 rows held out and fitted on all.

    Raises DataError for a table, ArgumentError for an argument that cannot be used. Torch's and NumPy's global
    generators are left as they were.
    """
    allowed = read_budget(budget)
    clock = Clock(allowed)
    _check(strategy, cv, random_state)
    if (storage is None) != (study is None):
        raise ArgumentError("tune: storage and study go together: where the search is shared, and under which name")
    wanted = space if isinstance(space, Space) else Space(space or {})
    # What is only needed at the end is looked for now, not after minutes of training.
    for module in ("pandas", "optuna", *(("safetensors", "jinja2", "plotly") if out is not None else ())):
        require(module, "mlpkit.tune")
    target_path = rundir.check(out, overwrite) if out is not None else None
    problem = read_problem(X, y, task, cv, categorical, ignore, groups=groups, time=time, sample_weight=sample_weight)
    asked = [strategy, str(allowed), cv, wanted.to_plain()]
    if storage is not None:
        journal, seed = _shared(storage, study or "", problem, random_state, asked)
    else:
        journal, seed = _journal(target_path, problem, resume, random_state, asked)
    wanted = wanted.for_task(
        problem.target.task,
        positive_target=problem.target.task == "regression" and bool((problem.target.values > 0.0).all()),
        numeric=sum(column.kind == "numeric" for column in problem.columns),
    )
    metric = "accuracy" if problem.target.task == "classification" else "R2"
    whole: large.Whole | None = None
    if problem.rows > large.MOST_ROWS:
        problem, whole = large.sampled(problem, seed)
    with closing(journal), speak.choose(progress, metric, cv) as say, _threads() as threads:
        search = _prepared(problem, wanted, cv, seed, clock, say, journal)
        search.threads = threads
        averaging = whole is None and (strategy == "auto" if ensemble is None else bool(ensemble))
        search.final_fits, search.averaging = _FITS_OF_AN_AVERAGE if averaging else 1, averaging
        search.share = 1.0 if whole is None else large.SEARCH_SHARE
        _run_strategy(strategy, search)
        result = from_trials(search.trials, [widths(params) for params in search.untried])
        committee = choose(search, result) if averaging else None
        model, epochs, expected = _fitted(search, result, committee, whole)
    settings = {
        "strategy": strategy, "budget": str(allowed), "cv": cv, "seed": seed, "epochs_of_refit": epochs,
        "space": wanted.to_plain(),
    }  # fmt: skip
    run = _run(search, result, committee, model, settings, command, expected)
    if whole is not None:
        run.data |= {"rows": whole.problem.rows, "searched": problem.rows, "held_out": len(whole.held)}
    run.test_score = None if test is None else model.score(*test)
    if target_path is not None:
        run.save(target_path, overwrite=overwrite)
        if journal.path is not None:
            journal.path.unlink(missing_ok=True)
    return run


def _prepared(
    problem: Problem, space: Space, cv: int, seed: int, clock: Clock, say: speak.Silent, journal: Journal
) -> Search:
    """The search before its first candidate: folds drawn, opening words said."""
    say.note(_opening(problem, cv, seed))
    for note in problem.notes:
        say.note(f"note: {note}")
    if journal.resumed:
        say.note(f"going on with an earlier run: {journal.resumed} results are known")
    folds = make_folds(
        problem.target.values, cv, seed, stratify=problem.target.task == "classification", groups=problem.groups,
        order=problem.order,
    )  # fmt: skip
    return Search(problem, folds, space, seed, clock, say, journal)


def _run(
    search: Search, climb: Climb, committee: Committee | None, model: TunedModel, settings: dict[str, Any],
    command: str | None, expected: Estimate | None,
) -> Run:  # fmt: skip
    problem = search.problem
    return Run(
        estimator=model,
        verdicts=judge(climb, search.metric, _floor(problem), search=search, committee=committee, expected=expected),
        climb=climb,
        study=to_study(climb, search.metric, search.seed, search.space),
        folds=search.folds,
        metric=search.metric,
        settings=settings,
        data={
            "rows": problem.rows, "sha256": problem.fingerprint, "notes": problem.notes,
            "features": len(model.encoder.feature_names),
        },
        command=command,
        seconds=search.clock.now(),
        estimate=expected,
        search=search,
        committee=committee,
    )  # fmt: skip


def _run_strategy(strategy: str, search: Search) -> None:
    from mlpkit.tune.auto import auto
    from mlpkit.tune.strategies import STRATEGIES as ALONE

    _ = search.linear
    (auto if strategy == "auto" else ALONE[strategy])(search)


def _fitted(
    search: Search, result: Climb, committee: Committee | None, whole: large.Whole | None
) -> tuple[TunedModel, int, Estimate | None]:
    """The winner fitted on all rows, for how many epochs, and what to expect of it on new ones."""
    rows = (search.problem if whole is None else whole.problem).rows
    search.say.note(f"refitting {result.winner.words} on all {rows} rows")
    if whole is not None:
        return large.fit(search, result.winner, whole)
    model, epochs = fit(search, result.winner, committee)
    return model, epochs, estimate(search, result, committee)


def _journal(
    out: Path | None, problem: Problem, resume: bool, random_state: int | None, settings: list[Any]
) -> tuple[Journal, int]:
    """Where the search is written down while it runs, and its seed: that of the killed run, if none is given."""
    if out is None:
        return Journal(), secrets.randbelow(2**31) if random_state is None else int(random_state)
    path = out.with_name(f".{out.name}.journal")
    before = header_of(path) if resume else None
    if not resume:
        path.unlink(missing_ok=True)
    header = {"sha256": problem.fingerprint, "settings": settings, "versions": versions()}
    seed = random_state
    if seed is None and before is not None and all(before.get(key) == value for key, value in header.items()):
        seed = before.get("seed")
    seed = secrets.randbelow(2**31) if seed is None else int(seed)
    return Journal(path, {**header, "seed": seed}), seed


def _shared(
    storage: str, name: str, problem: Problem, random_state: int | None, settings: list[Any]
) -> tuple[Journal, int]:
    from mlpkit.tune.shared import Shared

    drawn = int(hashlib.sha256(f"{problem.fingerprint} {name}".encode()).hexdigest()[:7], 16)
    seed = drawn if random_state is None else int(random_state)
    header = {"sha256": problem.fingerprint, "settings": settings, "versions": versions(), "seed": seed}
    return Shared(storage, name, header), seed


def _check(strategy: str, cv: int, random_state: int | None) -> None:
    if strategy not in STRATEGIES:
        raise ArgumentError(f"tune: strategy is {strategy!r}, must be one of {', '.join(STRATEGIES)}")
    if not isinstance(cv, int) or isinstance(cv, bool) or not 2 <= cv <= 20:
        raise ArgumentError(f"tune: cv is {cv!r}, must be a whole number of folds from 2 to 20")
    whole = isinstance(random_state, int | np.integer) and not isinstance(random_state, bool)
    if random_state is not None and not (whole and 0 <= random_state < 2**32):
        raise ArgumentError(f"tune: random_state is {random_state!r}, must be None or a whole number below 2**32")


def _floor(problem: Problem) -> float:
    """What a constant guess scores: the largest class, or the mean (R2 of 0)."""
    if problem.target.task == "regression":
        return 0.0
    return float(np.bincount(problem.target.values).max()) / problem.rows


def _opening(problem: Problem, cv: int, seed: int) -> str:
    target = problem.target
    what = f"{len(target.classes)} classes" if target.task == "classification" else "a regression"
    columns = "1 column" if len(problem.columns) == 1 else f"{len(problem.columns)} columns"
    return f"{target.name}: {what}, {problem.rows} rows, {columns}; {cv} folds, seed {seed}"


@contextmanager
def _threads() -> Iterator[int]:
    """How many threads train members: torch's number. Torch itself has one meanwhile, whose sums are the same anywhere.

    A member's numbers do not depend on threads; those of torch's long sums do.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
