"""Tuning against its rivals, in process CPU time of one thread: throughput, quality, honesty of the score, the page.

python benchmarks/tuning.py throughput page quality honest housing target [--housing FILE] [--out FILE]

What was done is written down as it is done, and not done again on the same commit with the same settings. Rivals that
are not installed (lightgbm, pytabkit) are left out and named.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sklearn.datasets import make_moons
from sklearn.preprocessing import StandardScaler
from tuning_data import development
from tuning_quality import honest, housing, quality, timed
from tuning_results import Part
from tuning_rivals import optuna_and_pytorch, scikit_mlp
from tuning_target import target

from mlpkit.tune import Run, tune
from mlpkit.tune.spec import Spec
from mlpkit.tune.trainer import FoldData, Split, train_members

EPOCHS = 30


# Throughput


RIVAL_LOOPS = {"optuna + pytorch": optuna_and_pytorch, "scikit-learn": scikit_mlp}


def throughput(options: argparse.Namespace) -> None:
    """Trials per CPU-minute on the same configurations: 30 epochs; medians of the ratios of interleaved rounds."""
    settings = {name: getattr(options, name) for name in ("trials", "rival_trials", "rounds")}
    part = Part(options.out, "throughput", settings)
    tables = development()
    names = ("digits", "breast_cancer", "wine", "diabetes", "friedman1", "moons")
    found = {name: part.piece(name, _throughput, tables[name], options) for name in names}
    means = {rival: statistics.geometric_mean([own["ratio"][rival] for own in found.values()]) for rival in RIVAL_LOOPS}
    part.summary({"geometric_mean": means})
    print("throughput, geometric means of the ratios:", means, flush=True)


def _throughput(table: Any, options: argparse.Namespace) -> dict[str, Any]:
    data, specs = _split_of(*table), _configurations(options.trials)
    classes = int(data.train.y.max()) + 1 if data.train.y.dtype == torch.int64 else 0
    some = specs[:: max(1, len(specs) // options.rival_trials)]
    ratios: dict[str, list[float]] = {rival: [] for rival in RIVAL_LOOPS}
    seconds = []
    for _ in range(options.rounds):
        # The engine trains all of them, a rival every few: its time is scaled by how many these are.
        own, _ = timed(train_members, specs, [data], classes)
        for rival, call in RIVAL_LOOPS.items():
            ratios[rival].append(len(specs) / len(some) * timed(call, some, data, classes)[0] / own)
        seconds.append(own)
    found = {
        "trials_per_cpu_minute": 60 * len(specs) / statistics.median(seconds),
        "ratio": {rival: statistics.median(values) for rival, values in ratios.items()},
        "lowest": {rival: min(values) for rival, values in ratios.items()},
    }
    print("throughput", found, flush=True)
    return found


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


# Page


def page(options: argparse.Namespace) -> None:
    """CPU seconds and megabytes of the report of a search with 1,000 trials."""
    part = Part(options.out, "page", {"trials": options.page_trials})
    print("page", part.piece("moons", _page, options.page_trials), flush=True)


def _page(trials: int) -> dict[str, Any]:
    X, y = make_moons(150, noise=0.3, random_state=0)
    space = {"epochs": 10, "lr": (1e-4, 1e-1)}
    run: Run = tune(
        X, y, strategy="quasirandom", budget=f"{trials} trials", space=space, random_state=0, cv=3, progress=False
    )
    seconds, path = timed(run.report, Path(tempfile.mkdtemp()) / "page.html")
    parts = len(run.search.space.free()) if run.search else 0
    megabytes = path.stat().st_size / 1e6
    return {"trials": len(run.trials), "parts": parts, "cpu_seconds": seconds, "megabytes": megabytes}


PARTS = {
    "throughput": throughput, "page": page, "quality": quality, "honest": honest, "housing": housing, "target": target,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--trials", type=int, default=64, help="throughput: configurations a table")
    parser.add_argument("--rival-trials", type=int, default=4, help="throughput: how many of them a rival trains")
    parser.add_argument("--rounds", type=int, default=7, help="throughput: interleaved rounds")
    parser.add_argument("--splits", type=int, default=5, help="quality: folds of a table that are scored")
    parser.add_argument("--share", type=float, default=0.3, help="quality: budget, in CPU time of RealMLP-TD's fit")
    parser.add_argument("--runs", type=int, default=40, help="honest: runs of each problem")
    parser.add_argument("--first-seed", type=int, default=0, help="honest, target: the first seed")
    parser.add_argument("--honest-budget", default="40 trials")
    parser.add_argument("--page-trials", type=int, default=1000)
    parser.add_argument("--housing", type=Path, help="CSV file of California housing")
    parser.add_argument("--housing-budget", default="300s")
    parser.add_argument("--seeds", type=int, default=2, help="target: splits of each table")
    parser.add_argument("--rival-budget", type=int, default=200, help="target: trials of the rival")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # The first search imports what searches need: no method is to pay for that.
    tune(*make_moons(60, noise=0.3, random_state=0), budget="20 trials", random_state=0, progress=False)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
