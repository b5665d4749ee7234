"""The candidates as an Optuna study in memory, so that Optuna's own tools can read a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mlpkit.report._extras import require
from mlpkit.tune.distributions import to_distributions, to_optuna
from mlpkit.tune.ladder import Climb, Trial
from mlpkit.tune.parts import Choice, Part, Range, Value
from mlpkit.tune.space import Space


def to_study(climb: Climb, metric: str, seed: int, space: Space) -> Any:
    """An ``optuna.Study`` that maximises the mean score; fold scores are its intermediate values, step = fold.

    Parameters are the parts of the space that a candidate chose; momentum and betas appear as "1-beta1" and so on. A
    diverged candidate is FAIL, one that a rung or the budget stopped PRUNED, with the reason among its attributes.
    """
    optuna = require("optuna", "mlpkit.tune")
    with quiet(optuna):
        study = optuna.create_study(direction="maximize", study_name="mlpkit tune")
        study.set_user_attr("metric", metric)
        study.set_user_attr("seed", seed)
        study.set_user_attr("winner", climb.winner.name)
        for trial in climb.trials:
            study.add_trial(_frozen(optuna, trial, space))
    return study


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's log lines about studies and trials."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _frozen(optuna: Any, trial: Trial, space: Space) -> Any:
    # The ladder and refined ranges go beyond the space at times: each part is as wide as what was tried.
    own = space.with_parts(**{name: _reaching(space.parts[name], value) for name, value in trial.params.items()})
    states = optuna.trial.TrialState
    state = {"complete": states.COMPLETE, "diverged": states.FAIL}.get(trial.state, states.PRUNED)
    return optuna.trial.create_trial(
        state=state,
        value=trial.mean if state == states.COMPLETE else None,
        params=to_optuna(own, trial.params),
        distributions=to_distributions(own, list(trial.params)),
        intermediate_values={fold: item.score for fold, item in enumerate(trial.outcomes) if item.finished},
        user_attrs={
            "name": trial.name, "parameters": trial.parameters, "seconds": trial.seconds, "state": trial.state,
            "stage": trial.stage, "reason": trial.reason,
        },
    )  # fmt: skip


def _reaching(part: Part, value: Value) -> Part:
    if part.holds(value):
        return part
    if isinstance(part, Range):
        return replace(part, low=min(part.low, float(value or 0)), high=max(part.high, float(value or 0)))
    return Choice(tuple(sorted({*part.values, value}, key=lambda item: (str(type(item)), item))))
