"""What tuning is measured against: Optuna with idiomatic PyTorch, scikit-learn, LightGBM, RealMLP-TD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlpkit.tune.spec import Spec
from mlpkit.tune.trainer import FoldData

Fit = Callable[[Any, Any, bool, int], Callable[[Any], Any]]


def score_of(truth: Any, predicted: Any, classes: bool) -> float:
    if classes:
        return float(np.mean(truth == predicted))
    return 1.0 - float(np.sum((truth - predicted) ** 2) / np.sum((truth - truth.mean()) ** 2))


def optuna_and_pytorch(specs: Sequence[Spec], data: FoldData, classes: int) -> float:
    """An objective as tutorials write it: nn.Sequential, DataLoader, AdamW, validation and a report every epoch."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: Any) -> float:
        spec = specs[trial.number]
        trial.suggest_float("lr", spec.lr, spec.lr)
        layers: list[nn.Module] = []
        width = data.train.x.shape[1]
        for size in spec.hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        model = nn.Sequential(*layers, nn.Linear(width, max(1, classes)))
        loss_of = nn.CrossEntropyLoss() if classes else nn.MSELoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
        loader = DataLoader(TensorDataset(data.train.x, data.train.y), batch_size=spec.batch_size, shuffle=True)
        loss = 0.0
        for epoch in range(spec.epochs):
            model.train()
            for x, y in loader:
                optimizer.zero_grad()
                loss_of(model(x), y).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                loss = loss_of(model(data.validation.x), data.validation.y).item()
            trial.report(loss, epoch)
        return loss

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=len(specs))
    return float(study.best_value)


def scikit_mlp(specs: Sequence[Spec], data: FoldData, classes: int) -> float:
    """MLPClassifier or MLPRegressor for as many epochs, without its early stopping."""
    kind = MLPClassifier if classes else MLPRegressor
    x, y = data.train.x.numpy(), data.train.y.numpy().ravel()
    best = -np.inf
    for spec in specs:
        model = kind(
            hidden_layer_sizes=spec.hidden, alpha=spec.weight_decay, batch_size=min(spec.batch_size, len(x)),
            max_iter=spec.epochs, learning_rate_init=spec.lr, random_state=spec.seed, n_iter_no_change=10**6,
        )  # fmt: skip
        model.fit(x, y)
        best = max(best, model.score(data.validation.x.numpy(), data.validation.y.numpy().ravel()))
    return float(best)


def _scaled(model: Any) -> Any:
    return make_pipeline(StandardScaler(), model)


def _of(classifier: Callable[[int], Any], regressor: Callable[[int], Any]) -> Fit:
    def fit(X: Any, y: Any, classes: bool, seed: int) -> Callable[[Any], Any]:
        return (classifier if classes else regressor)(seed).fit(X, y).predict  # type: ignore[no-any-return]

    return fit


def installed() -> dict[str, str]:
    """Versions of the rivals that are at hand."""
    names = ("torch", "scikit-learn", "optuna", "lightgbm", "pytabkit")
    return {name: version(name) for name in names if find_spec(name.replace("scikit-learn", "sklearn"))}


def RIVALS() -> tuple[dict[str, Fit], list[str]]:
    """(what is installed, by name; what is not)."""
    forest = {"n_estimators": 300}
    found: dict[str, Fit] = {
        "linear": _of(
            lambda _: _scaled(LogisticRegressionCV(max_iter=2000)),
            lambda _: _scaled(RidgeCV(np.logspace(-3, 3, 13))),
        ),
        "svm": _of(
            lambda _: _searched(SVC(), "svc"), lambda _: _searched(SVR(), "transformedtargetregressor__regressor")
        ),
        "random forest": _of(
            lambda seed: RandomForestClassifier(random_state=seed, **forest),
            lambda seed: RandomForestRegressor(random_state=seed, **forest),
        ),
        "scikit-learn MLP": _of(
            lambda seed: _scaled(MLPClassifier(random_state=seed)),
            lambda seed: _scaled(_scaled_target(MLPRegressor(random_state=seed))),
        ),
    }
    missing = []
    if find_spec("lightgbm"):
        from lightgbm import LGBMClassifier, LGBMRegressor

        found["lightgbm"] = _of(
            lambda seed: LGBMClassifier(random_state=seed, verbose=-1, n_jobs=1),
            lambda seed: LGBMRegressor(random_state=seed, verbose=-1, n_jobs=1),
        )
    else:
        missing.append("lightgbm")
    if find_spec("pytabkit"):
        from pytabkit import RealMLP_TD_Classifier, RealMLP_TD_Regressor

        settings = {"device": "cpu", "n_threads": 1, "verbosity": 0}
        found["RealMLP-TD"] = _of(
            lambda seed: RealMLP_TD_Classifier(random_state=seed, **settings),
            lambda seed: RealMLP_TD_Regressor(random_state=seed, **settings),
        )
    else:
        missing.append("pytabkit")
    return found, missing


def _searched(model: Any, prefix: str) -> Any:
    grid = {f"{prefix}__C": [0.1, 1, 10, 100], f"{prefix}__gamma": ["scale", 0.01, 0.1]}
    return GridSearchCV(_scaled(model if isinstance(model, SVC) else _scaled_target(model)), grid)


def _scaled_target(model: Any) -> Any:
    from sklearn.compose import TransformedTargetRegressor

    return TransformedTargetRegressor(model, transformer=StandardScaler())
