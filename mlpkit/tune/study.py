"""The candidates as an Optuna study in memory, so that Optuna's own tools can read a run."""

from __future__ import annotations

from typing import Any

from mlpkit.report._extras import require
from mlpkit.tune.ladder import TAPERS, WIDTHS, Climb, Trial


def to_study(climb: Climb, metric: str, seed: int) -> Any:
    """An ``optuna.Study`` that maximises the mean score; fold scores are its intermediate values, step = fold.

    Parameters: layers (0..2); width where there is a layer; taper (second layer = width / taper) where there are two.
    A diverged candidate is FAIL, one cut by the clock PRUNED.
    """
    optuna = require("optuna", "mlpkit.tune")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", study_name="mlpkit ladder")
        study.set_user_attr("metric", metric)
        study.set_user_attr("seed", seed)
        study.set_user_attr("winner", climb.winner.name)
        for trial in climb.trials:
            study.add_trial(_frozen(optuna, trial))
    finally:
        optuna.logging.set_verbosity(before)
    return study


def _frozen(optuna: Any, trial: Trial) -> Any:
    distributions: dict[str, Any] = {"layers": optuna.distributions.IntDistribution(0, 2)}
    params: dict[str, Any] = {"layers": len(trial.hidden)}
    if trial.hidden:
        params["width"] = trial.hidden[0]
        distributions["width"] = optuna.distributions.CategoricalDistribution(WIDTHS)
    if len(trial.hidden) == 2:
        params["taper"] = trial.hidden[0] // trial.hidden[1]
        distributions["taper"] = optuna.distributions.CategoricalDistribution(TAPERS)
    states = optuna.trial.TrialState
    state = {"complete": states.COMPLETE, "diverged": states.FAIL, "out of time": states.PRUNED}[trial.state]
    return optuna.trial.create_trial(
        state=state,
        value=trial.mean if state == states.COMPLETE else None,
        params=params,
        distributions=distributions,
        intermediate_values={fold: item.score for fold, item in enumerate(trial.outcomes) if item.finished},
        user_attrs={"name": trial.name, "parameters": trial.parameters, "seconds": trial.seconds, "state": trial.state},
    )
