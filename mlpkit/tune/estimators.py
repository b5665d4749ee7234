"""scikit-learn estimators: one MLP with given hyperparameters, and the whole search behind ``fit``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_feature_names,
    _check_n_features,
    _check_sample_weight,
    check_is_fitted,
    column_or_1d,
    validate_data,
)  # fmt: skip
from torch import nn

from mlpkit.errors import ArgumentError
from mlpkit.tune import trainer
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.evaluate import make_spec
from mlpkit.tune.findings import Verdict
from mlpkit.tune.folds import split
from mlpkit.tune.model import TunedModel
from mlpkit.tune.problem import Problem, encode_all, target_scale, target_tensor
from mlpkit.tune.run import Run
from mlpkit.tune.spec import Spec
from mlpkit.tune.table import Column, clean, learn_columns, pandas
from mlpkit.tune.target import Target

_SOLVERS = ("adam", "adamw", "sgd", "rmsprop")
_EPOCHS_UNSEEN = 100  # Where no row can be held back to tell.
_OLD_NAMES = {"logistic": "sigmoid"}


class _Tabular(BaseEstimator):  # type: ignore[misc]
    """What the four share: tables in, equal rows merged, labels or numbers out of ``model_``."""

    _classifier = False

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        return tags

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """One label or number per row of ``X``."""
        check_is_fitted(self)
        model: TunedModel = self.model_
        predicted = model.predict(self._table(X, reset=False))
        return self.classes_[np.asarray(predicted, dtype=np.int64)] if self._classifier else predicted

    def uncertainty(self, X: Any, *, samples: int = 50, seed: int = 0) -> Any:
        """How far each prediction can be trusted, as a DataFrame: ``TunedModel.uncertainty``."""
        check_is_fitted(self)
        model: TunedModel = self.model_
        return model.uncertainty(self._table(X, reset=False), samples=samples, seed=seed)

    def export(self) -> nn.Module:
        """The network as stock PyTorch modules, on encoded inputs (``model_.encoder`` makes them)."""
        check_is_fitted(self)
        model: TunedModel = self.model_
        return model.export()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors and model.json, which ``mlpkit.tune.TunedModel.load`` reads: no code, no data."""
        check_is_fitted(self)
        Path(directory).mkdir(parents=True, exist_ok=True)
        model: TunedModel = self.model_
        if self._classifier:
            labels = tuple(value.item() if hasattr(value, "item") else value for value in self.classes_)
            model = _relabelled(model, labels)
        model.save(directory)

    def _table(self, X: Any, reset: bool) -> Any:
        """``X`` as a DataFrame: numbers checked as scikit-learn does, other columns as they are."""
        pd = pandas()
        if hasattr(X, "to_pandas"):
            X = X.to_pandas()
        if isinstance(X, pd.DataFrame) and not all(pd.api.types.is_numeric_dtype(kind) for kind in X.dtypes):
            _check_feature_names(self, X, reset=reset)
            _check_n_features(self, X, reset=reset)
            frame = X.reset_index(drop=True)
            frame.columns = [str(name) for name in frame.columns]
            return frame
        least = 1 if not reset else 2
        values = validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan", ensure_min_samples=least
        )
        return pd.DataFrame(values, columns=self._names())

    def _names(self) -> list[str]:
        names = getattr(self, "feature_names_in_", None)
        return [f"x{at}" for at in range(self.n_features_in_)] if names is None else [str(name) for name in names]

    def _read(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, npt.NDArray[Any], npt.NDArray[np.float64]]:
        """(table, target, weights) with equal rows merged: twice a row is the row with twice the weight."""
        if y is None:
            raise ValueError(f"This {type(self).__name__} estimator requires y to be passed, but the target y is None")
        frame = self._table(X, reset=True)
        target = column_or_1d(y, warn=True)
        if len(target) != len(frame):
            raise ValueError(f"Found input variables with inconsistent numbers of samples: {[len(frame), len(target)]}")
        if self._classifier:
            check_classification_targets(target)
        else:
            target = np.asarray(target, dtype=np.float64)
            if not np.isfinite(target).all():
                raise ValueError("Input y contains NaN or infinity")
        weight = _check_sample_weight(sample_weight, frame, dtype=np.float64, ensure_non_negative=True)
        frame, target, weight = _merged(frame, target, weight)
        if self._classifier:
            self.classes_, target = np.unique(target, return_inverse=True)
        return frame, target, weight


class _Fixed(_Tabular):
    """``fit`` of the two estimators with given hyperparameters."""

    def __init__(
        self, hidden_layer_sizes: Any = (100,), activation: str = "relu", *, solver: str = "adam",
        alpha: float = 0.0001, batch_size: int | str = "auto", learning_rate_init: float = 0.001, max_iter: int = 200,
        dropout: Any = 0.0, norm: str | None = None, init: str = "xavier_uniform", schedule: str = "constant",
        label_smoothing: float = 0.0, early_stopping: bool = False, n_iter_no_change: int = 10,
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.dropout = dropout
        self.norm = norm
        self.init = init
        self.schedule = schedule
        self.label_smoothing = label_smoothing
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train the network. X: array, pandas or polars table, gaps and categories allowed."""
        frame, target, weight = self._read(X, y, sample_weight)
        problem = _problem(frame, target, weight, self._classifier)
        spec = self._spec(problem)
        out = len(problem.target.classes)
        epochs = self.max_iter
        if self.early_stopping:
            epochs = _best_epochs(problem, spec, out)
        self.model_ = _fitted(problem, spec, epochs)
        self.n_iter_ = int(epochs)
        return self

    def _spec(self, problem: Problem) -> Spec:
        sizes = self.hidden_layer_sizes
        hidden = tuple(int(size) for size in (sizes if hasattr(sizes, "__iter__") else (sizes,)))
        if self.solver not in _SOLVERS:
            raise ArgumentError(f"solver is {self.solver!r}, must be one of {', '.join(_SOLVERS)}")
        if not isinstance(self.max_iter, int | np.integer) or self.max_iter < 1:
            raise ArgumentError(f"max_iter is {self.max_iter!r}, must be a whole number of epochs from 1 up")
        batch = min(200, problem.rows) if self.batch_size == "auto" else int(self.batch_size)
        if batch < 1:
            raise ArgumentError(f"batch_size is {self.batch_size!r}, must be 'auto' or a whole number from 1 up")
        dropout = tuple(self.dropout) if hasattr(self.dropout, "__iter__") else float(self.dropout)
        return Spec(
            hidden, lr=float(self.learning_rate_init), weight_decay=float(self.alpha), batch_size=batch,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            activation=_OLD_NAMES.get(self.activation, self.activation), patience=int(self.n_iter_no_change),
            dropout=dropout, norm=self.norm, init=self.init, optimizer=self.solver, schedule=self.schedule,
            label_smoothing=float(self.label_smoothing), epochs=int(self.max_iter),
        )  # fmt: skip


class _Tuned(_Tabular):
    """``fit`` of the two estimators that search."""

    _task = "regression"

    def __init__(
        self, strategy: str = "auto", budget: float | str = 120.0, *, cv: int = 5, space: Any = None,
        random_state: Any = None, verbose: int = 0,
    ) -> None:  # fmt: skip
        self.strategy = strategy
        self.budget = budget
        self.cv = cv
        self.space = space
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Any:
        """Search on these rows; every call is a search of its own. With groups, equal rows are not merged."""
        from mlpkit.tune.search import tune

        if groups is None:
            frame, target, weight = self._read(X, y, sample_weight)
        else:
            frame, target = self._table(X, reset=True), column_or_1d(y, warn=True)
            weight = _check_sample_weight(sample_weight, frame, dtype=np.float64)
            if self._classifier:
                self.classes_, target = np.unique(target, return_inverse=True)
        if self._classifier and len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs two classes, y holds one class: {self.classes_[0]!r}")
        counts = np.sort(np.bincount(target)) if self._classifier else np.array([len(target)] * 2)
        if len(target) < 8 or counts[-2] < 2:
            return self._too_few(frame, target, weight)
        wanted = self.cv if isinstance(self.cv, int | np.integer) else len(self.cv)
        self.cv_ = int(max(2, min(wanted, len(target) // 4, counts[-2])))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        run = tune(
            frame, target, strategy=self.strategy, budget=self.budget, cv=self.cv_, random_state=seed,
            space=self.space, groups=groups, sample_weight=None if (weight == weight[0]).all() else weight,
            task=self._task, progress=None if self.verbose else False,
        )  # fmt: skip
        self.run_: Run | None = run
        self.model_ = run.estimator
        self.model_.model.double()
        run.search = None  # It holds the rows; what was learnt does not.
        winner = run.winner
        self.best_params_ = dict(winner.params)
        self.best_score_ = winner.mean
        self.best_index_ = winner.number
        self.verdicts_ = run.verdicts
        self.n_iter_ = int(run.settings["epochs_of_refit"])
        trials = [trial for trial in run.trials if trial.state == "complete"]
        self.cv_results_ = {
            "params": [trial.params for trial in trials],
            "mean_test_score": np.array([trial.mean for trial in trials]),
            "std_test_score": np.array([float(np.std(trial.scores)) for trial in trials]),
            "mean_train_score": np.array([trial.train_mean for trial in trials]),
        }
        return self

    def _too_few(self, frame: Any, target: npt.NDArray[Any], weight: npt.NDArray[np.float64]) -> Any:
        """No folds can be made of so few different rows: the linear model, and a verdict that says so."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        problem = _problem(frame, target, weight, self._classifier)
        spec = make_spec((), len(target), seed)
        self.model_ = _fitted(problem, spec, _EPOCHS_UNSEEN)
        text = f"{len(target)} different rows are too few to search: a linear model was fitted."
        self.verdicts_ = [Verdict("depth", "inconclusive", text, "notice", {"rows": len(target)})]
        self.run_, self.best_params_, self.n_iter_ = None, {"layers": 0}, _EPOCHS_UNSEEN
        return self


class _Probabilities(ClassifierMixin):  # type: ignore[misc]
    _classifier = True

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """(rows, classes) probabilities in float64 that sum to 1, in the order of ``classes_``."""
        check_is_fitted(self)
        return self.model_.predict_proba(self._table(X, reset=False))  # type: ignore[no-any-return]


class MLPClassifier(_Probabilities, _Fixed):
    """A multi-layer perceptron for classes, by scikit-learn's names.

    hidden_layer_sizes, activation ("logistic" or any of mlpkit's), solver ("adam", "adamw", "sgd", "rmsprop"), alpha
    (weight decay), batch_size, learning_rate_init, max_iter (epochs), early_stopping, n_iter_no_change, random_state
    mean what they mean there; dropout (one rate or one per layer), norm ("batch", "layer"), init, schedule and
    label_smoothing are mlpkit's. Inputs are standardised, gaps imputed and flagged, text columns become one-hot.
    Attributes: classes_, n_features_in_, feature_names_in_, n_iter_, model_ (a ``TunedModel``).
    """


class MLPRegressor(RegressorMixin, _Fixed):  # type: ignore[misc]
    """A multi-layer perceptron for one number; the target is standardised. Parameters as in ``MLPClassifier``."""


class TunedMLPClassifier(_Probabilities, _Tuned):
    """``mlpkit.tune.tune`` as a classifier: strategy, budget, cv, space and random_state are its arguments.

    cv is a number of folds, drawn over the distinct rows; of a list of splits only the length is taken.
    Attributes: run_ (the whole ``Run``), verdicts_, best_params_, best_score_, cv_results_ (finished candidates),
    model_, classes_. The score of the choice itself, corrected for it, is ``run_.estimate``.
    """

    _task = "classification"


class TunedMLPRegressor(RegressorMixin, _Tuned):  # type: ignore[misc]
    """``mlpkit.tune.tune`` as a regressor. Parameters and attributes as in ``TunedMLPClassifier``."""


def _merged(frame: Any, target: npt.NDArray[Any], weight: npt.NDArray[np.float64]) -> tuple[Any, Any, Any]:
    """Rows in one order, whatever they came in, equal ones as one, those of weight 0 gone."""
    pd = pandas()
    kept = weight > 0.0
    if not kept.any():
        raise ValueError("sample_weight holds only zeros: there is no sample to learn from")
    frame, target, weight = frame[kept].reset_index(drop=True), target[kept], weight[kept]
    columns = []
    for name in frame.columns:
        series = frame[name]
        number = pd.api.types.is_numeric_dtype(series)
        values = series.to_numpy(np.float64, na_value=np.nan) if number else pd.factorize(series, sort=False)[0]
        columns.append(np.where(np.isnan(values), np.nan, values + 0.0))  # One kind of NaN, one zero.
    _, codes = np.unique(target, return_inverse=True)
    table = np.ascontiguousarray(np.column_stack([*columns, codes]), dtype=np.float64)
    _, first, number_of = np.unique(table.view(np.uint64), axis=0, return_index=True, return_inverse=True)
    return frame.iloc[first].reset_index(drop=True), target[first], np.bincount(number_of.ravel(), weights=weight)


def _problem(frame: Any, target: npt.NDArray[Any], weight: npt.NDArray[np.float64], classes: bool) -> Problem:
    pd = pandas()
    if all(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes):
        columns = [Column(name, "numeric") for name in frame.columns]
    else:
        columns, _ = learn_columns(frame)
    labels = tuple(range(int(target.max()) + 1)) if classes else ()
    values = target.astype(np.int64 if classes else np.float64)
    own = Target("target", "classification" if classes else "regression", values, labels)
    scaled = None if (weight == weight[0]).all() else weight / weight.mean()
    return Problem(columns, clean(frame, columns), own, len(frame), [], "", scaled)


def _fitted(problem: Problem, spec: Spec, epochs: int) -> TunedModel:
    encoder, rows = encode_all(problem)
    mean, scale = target_scale(problem.target, np.arange(problem.rows))
    (network,) = trainer.refit([spec], rows, len(problem.target.classes), [epochs])
    return TunedModel(
        # In double precision a prediction does not depend on which rows are predicted with it.
        model=network.double(), task=problem.target.task, target_name="target", classes=problem.target.classes,
        columns=problem.columns, encoder=encoder, hidden=spec.hidden, activation=spec.activation, norm=spec.norm,
        dropout=spec.dropout, target_mean=mean, target_scale=scale,
    )  # fmt: skip


def _best_epochs(problem: Problem, spec: Spec, out: int) -> int:
    """Epochs until the loss of held-back rows is lowest."""
    rng = np.random.default_rng(spec.seed)
    every = np.arange(problem.rows)
    train, held = split(problem.target.values, every, rng, stratify=out > 0)
    if not len(held):
        return spec.epochs
    encoder = Encoder.fit(problem.data, problem.columns, train)
    mean, scale = target_scale(problem.target, train)
    x = torch.from_numpy(encoder.transform(problem.data))
    y = target_tensor(problem.target, mean, scale)
    weight = None if problem.weight is None else torch.from_numpy(problem.weight.astype(np.float32))
    parts = [trainer.Split(x[rows], y[rows], None if weight is None else weight[rows]) for rows in (train, held, held)]
    (outcome,) = trainer.train_members([spec], [trainer.FoldData(*parts)], out)[0]
    return outcome.best_epoch + 1


def _relabelled(model: TunedModel, labels: tuple[Any, ...]) -> TunedModel:
    from dataclasses import replace

    return replace(model, classes=labels)
