"""What a search is worth: scores and ranks against other methods, the honesty of its score, housing."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.datasets import make_friedman1, make_moons
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from tuning_data import development, linear_classes, linear_numbers
from tuning_results import Part
from tuning_rivals import RIVALS, installed, score_of

from mlpkit.tune import tune

Split = tuple[Any, Any, Any, Any]
REAL_MLP = "RealMLP-TD"
_CPU_SECONDS = 6.0  # Where RealMLP-TD, whose time sets the budget, is not installed.


def timed(call: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """(CPU seconds of this process, what the call returned)."""
    start = time.process_time()
    found = call(*given)
    return time.process_time() - start, found


# Quality


def quality(options: argparse.Namespace) -> None:
    """Test score and CPU seconds of one fit each on the same folds; ours has a share of RealMLP-TD's CPU time.

    Rivals are not trained again where only our sources have changed.
    """
    present, missing = RIVALS()
    theirs = Part(options.out, "rivals", {"folds": 5, "versions": installed()}, follows_sources=False)
    ours = Part(options.out, "quality", {"share": options.share, "splits": options.splits})
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for name, (X, y) in development().items():
        rows: dict[str, list[dict[str, float]]] = {}
        for number, split in enumerate(_folds(X, y, options.splits)):
            classes = len(np.unique(y)) <= 20
            for method, call in present.items():
                piece = theirs.piece(f"{method}, {name} {number}", _fit, call, split, classes, number)
                rows.setdefault(method, []).append(piece)
            real = rows[REAL_MLP][-1]["cpu_seconds"] if REAL_MLP in rows else _CPU_SECONDS
            own = ours.piece(f"{name} {number}", _fit, _mlpkit(options.share * real), split, classes, number)
            rows.setdefault("mlpkit", []).append(own)
        tables[name] = {
            method: {key: float(np.mean([item[key] for item in own])) for key in ("score", "cpu_seconds")}
            for method, own in rows.items()
        }
        print(
            name, {m: (round(v["score"], 4), round(v["cpu_seconds"], 2)) for m, v in tables[name].items()}, flush=True
        )
    ours.summary({"left_out": missing, "tables": tables, **_compared(tables)})


def _compared(tables: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    methods = list(next(iter(tables.values())))
    found: dict[str, Any] = {
        "mean_score": {m: float(np.mean([table[m]["score"] for table in tables.values()])) for m in methods},
        "average_rank": {m: float(np.mean([_rank(table, m) for table in tables.values()])) for m in methods},
    }
    if REAL_MLP in methods:
        gains = {name: table["mlpkit"]["score"] - table[REAL_MLP]["score"] for name, table in tables.items()}
        shares = [table["mlpkit"]["cpu_seconds"] / table[REAL_MLP]["cpu_seconds"] for table in tables.values()]
        found["against_realmlp"] = {"gain": gains, "worst": min(gains.values()), "largest_share_of_cpu": max(shares)}
    print(found, flush=True)
    return found


def _folds(X: Any, y: Any, count: int) -> Iterator[Split]:
    """The first ``count`` of five folds."""
    kind = StratifiedKFold if len(np.unique(y)) <= 20 else KFold
    for number, (train, test) in enumerate(kind(5, shuffle=True, random_state=0).split(X, y)):
        if number < count:
            yield X[train], X[test], y[train], y[test]


def _fit(call: Callable[..., Any], split: Split, classes: bool, seed: int) -> dict[str, float]:
    X_train, X_test, y_train, y_test = split
    seconds, predict = timed(call, X_train, y_train, classes, seed)
    return {"score": score_of(y_test, predict(X_test), classes), "cpu_seconds": seconds}


def _mlpkit(seconds: float) -> Callable[..., Callable[[Any], Any]]:
    def fit(X: Any, y: Any, classes: bool, seed: int) -> Callable[[Any], Any]:
        task = "classification" if classes else "regression"
        return tune(X, y, budget=f"{seconds} cpu-s", random_state=seed, task=task, progress=False).estimator.predict

    return fit


def _rank(table: dict[str, dict[str, float]], method: str) -> float:
    """1 is best; equals share a rank."""
    own = table[method]["score"]
    others = [item["score"] for name, item in table.items() if name != method]
    return 1 + sum(score > own for score in others) + sum(score == own for score in others) / 2


# Honesty

PROBLEMS: dict[str, Callable[[int, int], tuple[Any, Any]]] = {
    "accuracy, linear": lambda seed, rows: linear_classes(rows, 8, seed),
    "accuracy, moons": lambda seed, rows: make_moons(rows, noise=0.35, random_state=seed),
    "R2, linear": lambda seed, rows: linear_numbers(rows, 8, seed),
    "R2, friedman1": lambda seed, rows: make_friedman1(rows, noise=2.0, random_state=seed),
}
_KNOWN, _FRESH = 200, 20_000


def honest(options: argparse.Namespace) -> None:
    """The corrected score against a fresh test of 20,000 rows: its mean bias, and how often the interval holds it."""
    part = Part(options.out, "honest", {"rows": _KNOWN, "fresh": _FRESH, "budget": options.honest_budget})
    seeds = range(options.first_seed, options.first_seed + options.runs)
    found = {}
    for name in PROBLEMS:
        runs = [part.piece(f"{name} {seed}", _honest, name, seed, options.honest_budget) for seed in seeds]
        bias = np.array([run["corrected"] - run["truth"] for run in runs])
        found[name] = {
            "bias": float(bias.mean()),
            "bias_se": float(bias.std(ddof=1) / np.sqrt(len(bias))),
            "raw_bias": float(np.mean([run["raw"] - run["truth"] for run in runs])),
            "coverage": float(np.mean([run["low"] <= run["truth"] <= run["high"] for run in runs])),
        }
        print(name, found[name], flush=True)
    kinds = {
        kind: {
            "bias": float(np.mean([own["bias"] for name, own in found.items() if name.startswith(kind)])),
            "coverage": float(np.mean([own["coverage"] for name, own in found.items() if name.startswith(kind)])),
        }
        for kind in ("accuracy", "R2")
    }
    coverage = float(np.mean([own["coverage"] for own in found.values()]))
    part.summary({"seeds": [seeds[0], seeds[-1]], "problems": found, **kinds, "coverage": coverage})
    print(kinds, "coverage", coverage, flush=True)


def _honest(name: str, seed: int, budget: str) -> dict[str, Any]:
    # One draw, cut in two: the law of a seed is the same on both sides.
    X, y = PROBLEMS[name](seed, _KNOWN + _FRESH)
    rows = np.random.default_rng(seed).permutation(len(X))
    train, fresh = rows[:_KNOWN], rows[_KNOWN:]
    run = tune(X[train], y[train], budget=budget, random_state=seed, progress=False)
    assert run.estimate is not None
    return {
        "truth": run.estimator.score(X[fresh], y[fresh]), "corrected": run.estimate.score, "raw": run.estimate.raw,
        "low": run.estimate.low, "high": run.estimate.high,
    }  # fmt: skip


# Housing


def housing(options: argparse.Namespace) -> None:
    """RMSE on a fifth of California housing (in 100,000 dollars) after a budget, and the time that it took."""
    part = Part(options.out, "housing", {"budget": options.housing_budget})
    print("housing", part.piece("housing", _housing, options), flush=True)


def _housing(options: argparse.Namespace) -> dict[str, Any]:
    import pandas as pd

    frame = pd.read_csv(options.housing)
    target = frame.columns[-1]
    train, test = train_test_split(frame, test_size=0.2, random_state=0)
    start, cpu = time.perf_counter(), time.process_time()
    run = tune(train, target, budget=options.housing_budget, random_state=0, progress=False)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    rmse = float(np.sqrt(np.mean((run.estimator.predict(test) - test[target]) ** 2)))
    return {
        "rmse": rmse, "wall_seconds": wall, "cpu_seconds": cpu, "rows": [len(train), len(test)],
        "trials": len(run.trials), "winner": run.winner.name,
    }  # fmt: skip
