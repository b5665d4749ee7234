"""Tuning against its rivals, in process CPU time of one thread: throughput, quality, honesty of the score, the page.

python benchmarks/tuning.py throughput quality honest page housing [--housing FILE] [--runs 60] [--out FILE]

Rivals that are not installed (lightgbm, pytabkit) are left out and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sklearn.datasets import make_friedman1, make_moons
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from tuning_data import development, environment, linear_classes, linear_numbers
from tuning_rivals import RIVALS, optuna_and_pytorch, scikit_mlp, score_of

from mlpkit.tune import Run, tune
from mlpkit.tune.spec import Spec
from mlpkit.tune.trainer import FoldData, Split, train_members

EPOCHS = 30


def timed(call: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """(CPU seconds of this process, what the call returned)."""
    start = time.process_time()
    found = call(*given)
    return time.process_time() - start, found


# Throughput


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Trials per CPU-minute on the same configurations: 30 epochs; medians of the ratios of interleaved rounds."""
    tables = development()
    found: dict[str, Any] = {}
    for name in ("digits", "breast_cancer", "wine", "diabetes", "friedman1", "moons"):
        data = _split_of(*tables[name])
        specs = _configurations(options.trials)
        classes = int(data.train.y.max()) + 1 if data.train.y.dtype == torch.int64 else 0
        ratios: dict[str, list[float]] = {"optuna + pytorch": [], "scikit-learn": []}
        seconds = []
        for _ in range(options.rounds):
            own, _ = timed(train_members, specs, [data], classes)
            some = specs[:: max(1, len(specs) // options.rival_trials)]
            scale = len(specs) / len(some)
            for rival, call in (("optuna + pytorch", optuna_and_pytorch), ("scikit-learn", scikit_mlp)):
                ratios[rival].append(scale * timed(call, some, data, classes)[0] / own)
            seconds.append(own)
        found[name] = {
            "trials_per_cpu_minute": 60 * len(specs) / statistics.median(seconds),
            "ratio": {rival: statistics.median(values) for rival, values in ratios.items()},
        }
        print(name, found[name], flush=True)
    means = {
        rival: statistics.geometric_mean([item["ratio"][rival] for item in found.values()])
        for rival in ("optuna + pytorch", "scikit-learn")
    }
    print("geometric means:", means)
    return {"tables": found, "geometric_mean": means, "trials": options.trials, "rounds": options.rounds}


def _configurations(count: int) -> list[Spec]:
    rng = np.random.default_rng(0)
    specs = []
    for seed in range(count):
        width = int(2 ** rng.integers(4, 8))
        hidden = (width,) if rng.random() < 0.5 else (width, width // 2)
        lr, decay = float(10 ** rng.uniform(-4, -1.5)), float(10 ** rng.uniform(-4, -2))
        batch = int(2 ** rng.integers(5, 8))
        specs.append(Spec(hidden, lr, decay, batch, seed, patience=None, epochs=EPOCHS))
    return specs


def _split_of(X: Any, y: Any) -> FoldData:
    x = torch.from_numpy(StandardScaler().fit_transform(X).astype(np.float32))
    numbers = len(np.unique(y)) > 20
    target = torch.from_numpy(((y - y.mean()) / y.std()).astype(np.float32)[:, None] if numbers else y.astype(np.int64))
    parts = np.split(np.random.default_rng(0).permutation(len(x)), [int(0.6 * len(x)), int(0.8 * len(x))])
    return FoldData(*(Split(x[rows], target[rows]) for rows in parts))


# Quality


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Test score and CPU seconds of one fit each, on the same 75 % of the rows; ranks are over all methods present."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    present, missing = RIVALS()
    print("left out:", missing)
    for name, (X, y) in development().items():
        rows: dict[str, list[tuple[float, float]]] = {}
        for seed in range(options.splits):
            labels = y if len(np.unique(y)) <= 20 else None
            parts = train_test_split(X, y, test_size=0.25, random_state=seed, stratify=labels)
            for method, call in {"mlpkit": _mlpkit(options.budget), **present}.items():
                X_train, X_test, y_train, y_test = parts
                seconds, predict = timed(call, X_train, y_train, labels is not None, seed)
                rows.setdefault(method, []).append((score_of(y_test, predict(X_test), labels is not None), seconds))
        found[name] = {
            method: {
                "score": float(np.mean([item[0] for item in own])),
                "cpu_seconds": float(np.mean([i[1] for i in own])),
            }
            for method, own in rows.items()
        }
        print(name, {m: (round(v["score"], 4), round(v["cpu_seconds"], 2)) for m, v in found[name].items()}, flush=True)
    methods = list(next(iter(found.values())))
    ranks = {m: float(np.mean([_rank(table, m) for table in found.values()])) for m in methods}
    means = {m: float(np.mean([table[m]["score"] for table in found.values()])) for m in methods}
    print("mean score:", means, "\naverage rank:", ranks)
    return {
        "tables": found, "mean_score": means, "average_rank": ranks, "left_out": missing, "splits": options.splits,
        "budget": options.budget,
    }  # fmt: skip


def _mlpkit(budget: str) -> Callable[..., Callable[[Any], Any]]:
    def fit(X: Any, y: Any, classes: bool, seed: int) -> Callable[[Any], Any]:
        task = "classification" if classes else "regression"
        return tune(X, y, budget=budget, random_state=seed, task=task, progress=False).estimator.predict

    return fit


def _rank(table: dict[str, dict[str, float]], method: str) -> float:
    """1 is best; equals share a rank."""
    own = table[method]["score"]
    others = [item["score"] for name, item in table.items() if name != method]
    return 1 + sum(score > own for score in others) + sum(score == own for score in others) / 2


# Honesty


def honest(options: argparse.Namespace) -> dict[str, Any]:
    """The corrected score against a fresh test of 20,000 rows: its mean bias, and how often the interval holds it."""
    found = {}
    for name, draw in {
        "accuracy, linear": lambda seed, rows: linear_classes(rows, 8, 0 if rows > 5000 else seed),
        "accuracy, moons": lambda seed, rows: make_moons(rows, noise=0.35, random_state=seed),
        "R2, linear": lambda seed, rows: linear_numbers(rows, 8, seed),
        "R2, friedman1": lambda seed, rows: make_friedman1(rows, noise=2.0, random_state=seed),
    }.items():
        biases, raw, held = [], [], []
        for seed in range(options.runs):
            # One draw, cut in two: the law of a seed is the same on both sides.
            X, y = draw(seed, 20_000)
            rows = np.random.default_rng(seed).permutation(20_000)
            train, fresh = rows[:200], rows[200:]
            run = tune(X[train], y[train], budget=options.honest_budget, random_state=seed, progress=False)
            assert run.estimate is not None
            truth = run.estimator.score(X[fresh], y[fresh])
            biases.append(run.estimate.score - truth)
            raw.append(run.winner.mean - truth)
            held.append(run.estimate.low <= truth <= run.estimate.high)
        found[name] = {
            "bias": float(np.mean(biases)), "bias_se": float(np.std(biases) / np.sqrt(len(biases))),
            "raw_bias": float(np.mean(raw)), "coverage": float(np.mean(held)),
        }  # fmt: skip
        print(name, found[name], flush=True)
    return {"problems": found, "runs": options.runs, "rows": 200, "budget": options.honest_budget}


# Page


def page(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds and megabytes of the report of a search over 12 parts with 1,000 trials."""
    X, y = make_moons(150, noise=0.3, random_state=0)
    space = {"epochs": 10, "lr": (1e-4, 1e-1)}
    run: Run = tune(
        X, y, strategy="quasirandom", budget=f"{options.page_trials} trials", space=space, random_state=0, cv=3,
        progress=False,
    )  # fmt: skip
    seconds, path = timed(run.report, Path(tempfile.mkdtemp()) / "page.html")
    size = path.stat().st_size / 1e6
    print(f"page of {len(run.trials)} trials: {seconds:.2f} CPU-s, {size:.2f} MB")
    return {"trials": len(run.trials), "parts": len(run.search.space.free()) if run.search else 0,
            "cpu_seconds": seconds, "megabytes": size}  # fmt: skip


# Housing


def housing(options: argparse.Namespace) -> dict[str, Any]:
    """RMSE on 20 % of California housing (in 100,000 dollars) after a budget, and the wall time it took."""
    import pandas as pd

    frame = pd.read_csv(options.housing)
    target = frame.columns[-1]
    train, test = train_test_split(frame, test_size=0.2, random_state=0)
    start = time.perf_counter()
    run = tune(train, target, budget=options.housing_budget, random_state=0, progress=False)
    wall = time.perf_counter() - start
    rmse = float(np.sqrt(np.mean((run.estimator.predict(test) - test[target]) ** 2)))
    print(f"housing: RMSE {rmse:.4f}, {wall:.0f} s, {len(run.trials)} trials, winner {run.winner.name}")
    return {"rmse": rmse, "wall_seconds": wall, "trials": len(run.trials), "winner": run.winner.name}


PARTS = {"throughput": throughput, "quality": quality, "honest": honest, "page": page, "housing": housing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--rival-trials", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--budget", default="20 cpu-s")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--honest-budget", default="40 trials")
    parser.add_argument("--page-trials", type=int, default=1000)
    parser.add_argument("--housing", type=Path)
    parser.add_argument("--housing-budget", default="300s")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    words: dict[str, Any] = {"name": "tuning", **environment()}
    if options.out is not None and options.out.exists():
        words = {**json.loads(options.out.read_text()), **words}
    for part in options.parts:
        words[part] = PARTS[part](options)
        if options.out is not None:
            options.out.write_text(json.dumps(words, indent=2) + "\n")


if __name__ == "__main__":
    main()
