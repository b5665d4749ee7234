"""A run as plain data: trials, averages and versions as JSON holds them."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mlpkit.tune.ensemble import Committee
from mlpkit.tune.ladder import Trial


def committee_of(committee: Committee | None) -> dict[str, Any] | None:
    """Who is averaged, how it counts and what that gains."""
    if committee is None:
        return None
    return {
        "trials": [trial.number for trial in committee.trials],
        "weights": list(committee.weights),
        "seeds": list(committee.seeds),
        "saved": asdict(committee.step),
        "score": committee.score,
        "used": committee.better,
    }


def trial_of(trial: Trial, curves: bool) -> dict[str, Any]:
    """A candidate with its outcomes; curves: with the losses by epoch, too."""
    folds = [outcome.to_dict() for outcome in trial.outcomes]
    if not curves:
        folds = [{key: value for key, value in fold.items() if not key.endswith("_loss")} for fold in folds]
    return {
        "number": trial.number,
        "name": trial.name,
        "stage": trial.stage,
        "params": trial.params,
        "reason": trial.reason,
        "repeats": [outcome.score for outcome in trial.repeats],
        "halved": [outcome.score for outcome in trial.halved],
        "again": [[outcome.score for outcome in outcomes] for outcomes in trial.again],
        "hidden": list(trial.hidden),
        "parameters": trial.parameters,
        "state": trial.state,
        "mean": trial.mean,
        "se": trial.se,
        "train_mean": trial.train_mean,
        "seconds": trial.seconds,
        "folds": folds,
    }


def plain(value: Any) -> Any:
    """Text keys, lists, seven digits; what is no finite number becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in ("mlpkit", "torch", "numpy", "pandas", "optuna"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
