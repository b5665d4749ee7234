"""Are the verdicts right? Sixty generated problems whose truth is known, twelve kinds of five; and the ladder by seeds.

python benchmarks/verdicts.py [--kinds linear,leak] [--each 5] [--ladder 50] [--first-seed 0] [--out FILE]

The seeds that count are those that nobody looked at while the rules were written: give another --first-seed for each
run that is to be a proof. With --out, what was done is written down and not done again.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_friedman1, make_moons

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tuning_data import linear_classes, linear_numbers, spirals
from tuning_results import Part

from mlpkit.tune import Run, tune

Draw = Callable[[int], tuple[Any, Any]]
PER_KIND = 5


@dataclass(frozen=True)
class Problem:
    """A table by seed, how it is searched, and what a right verdict looks like."""

    kind: str
    draw: Draw
    right: Callable[[Run], bool]
    settings: dict[str, Any] = field(default_factory=dict)


def value_of(run: Run, kind: str) -> str:
    return next((verdict.value for verdict in run.verdicts if verdict.kind == kind), "")


def fit_is(*values: str) -> Callable[[Run], bool]:
    return lambda run: value_of(run, "fit") in values


def about(part: str, value: str) -> Callable[[Run], bool]:
    def right(run: Run) -> bool:
        found = [item for item in run.verdicts if item.kind == "hyperparameter" and item.numbers["part"] == part]
        return bool(found) and found[0].value == value

    return right


def alarmed(part: str, end: float | None) -> Callable[[Run], bool]:
    """An alarm at that end of the part; None: no alarm on it."""

    def right(run: Run) -> bool:
        ends = [item.numbers["end"] for item in run.verdicts if item.kind == "border" and item.value == part]
        return not ends if end is None else any(np.isclose(item, end) for item in ends)

    return right


# Tables


def noise(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(300, 6))
    return X, rng.normal(size=300) if seed % 2 else rng.permutation(np.arange(300) % 2)


def leaking(seed: int) -> tuple[Any, Any]:
    X, y = friedman(seed, rows=400) if seed % 2 else product(seed)
    known = y + 0.02 * np.std(y) * np.random.default_rng(seed).normal(size=len(y))
    return np.column_stack([X, known]), y


def linear(seed: int) -> tuple[Any, Any]:
    return linear_classes(400, 6, seed) if seed % 2 else linear_numbers(400, 6, seed)


def product(seed: int, rows: int = 500) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 3))
    return X, (X[:, 0] * X[:, 1] > 0).astype(int)


def friedman(seed: int, rows: int = 600, sd: float = 1.0) -> tuple[Any, Any]:
    X, y = make_friedman1(rows, noise=sd, random_state=seed)
    return X, y


def curved(seed: int) -> tuple[Any, Any]:
    if seed % 3 == 0:
        return product(seed)
    return spirals(400, seed) if seed % 3 == 1 else friedman(seed)


def wavy(seed: int, rows: int = 2000) -> tuple[Any, Any]:
    """A sum of waves: a few units cannot follow it."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, size=(rows, 2))
    return X, np.sin(5 * X[:, 0]) + np.cos(4 * X[:, 1]) + 0.05 * rng.normal(size=rows)


def flipped(seed: int) -> tuple[Any, Any]:
    """Eight columns, of which two matter, and a fifth of the labels wrong: a wide layer learns the labels by heart."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(500, 8))
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    return X, np.where(rng.random(500) < 0.2, 1 - y, y)


def scarce(seed: int) -> tuple[Any, Any]:
    """A smooth law without noise, of which too few rows are known."""
    return make_friedman1(120, n_features=6, noise=0.0, random_state=seed)  # type: ignore[no-any-return]


def plenty(seed: int) -> tuple[Any, Any]:
    if seed % 2:
        return make_moons(1000, noise=0.2, random_state=seed)  # type: ignore[no-any-return]
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(1000, 2))
    return X, X[:, 0] ** 2 + X[:, 1] + 0.5 * rng.normal(size=1000)


# Searches

LR = {"layers": 1, "width": 32, "optimizer": "adamw", "schedule": "constant", "activation": "relu", "dropout": 0.0}
SLOPE = {
    **LR, "optimizer": "sgd", "momentum": 0.9, "batch_size": 32, "epochs": 50, "norm": None, "init": "xavier_uniform",
    "weight_decay": 1e-4, "l1": 0.0, "loss": ["mse", "cross_entropy"], "label_smoothing": 0.0, "scaling": "standard",
    "log_target": False,
}  # fmt: skip


def over(lr: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {"strategy": "quasirandom", "budget": "48 trials", "space": {**SLOPE, "lr": lr, **more}}


FLAT = {"layers": [0, 1], "periodic": 0.0}  # Waves among the inputs would stand for the units that lack.
AUTO = {"strategy": "auto", "budget": "80 trials"}
KINDS: dict[str, list[Problem]] = {
    "no signal": [Problem("no signal", noise, fit_is("no signal"), AUTO)],
    "leak": [Problem("leak", leaking, lambda run: value_of(run, "leakage") == "suspected", AUTO)],
    "linear": [Problem("linear", linear, lambda run: value_of(run, "depth") == "linear", AUTO)],
    "curved": [Problem("curved", curved, lambda run: value_of(run, "depth").endswith("hidden"), AUTO)],
    "underfit": [
        Problem("underfit", wavy, fit_is("underfit"), {**AUTO, "space": {**FLAT, "width": [1, 2, 4]}}),
        Problem("underfit", wavy, fit_is("underfit"), {**AUTO, "space": {**FLAT, "epochs": 6, "lr": 1e-3}}),
    ],
    "overfit": [
        Problem(
            "overfit", flipped, fit_is("overfit"),
            {**AUTO, "space": {"dropout": 0.0, "weight_decay": 1e-4, "layers": [0, 1], "width": [64, 128, 256]}},
        )
    ],
    "data-limited": [Problem("data-limited", scarce, fit_is("data-limited"), AUTO)],
    "fine": [Problem("fine", plenty, fit_is("fine"), AUTO)],
    "border": [
        Problem("border", friedman, alarmed("lr", 1e-4), over((1e-6, 1e-4))),
        Problem("border", curved, alarmed("lr", 1e-4), over((1e-6, 1e-4))),
    ],
    "no border": [Problem("no border", friedman, alarmed("lr", None), over((1e-6, 1e1)))],
    "volatile": [Problem("volatile", friedman, about("lr", "volatile"), over((1e-9, 1e3)))],
    "robust": [
        Problem("robust", friedman, about("l1", "robust"), over((1e-3, 1e-1), l1=[0.0, 1e-7, 1e-6, 1e-5])),
        Problem("robust", product, about("init", "robust"), over((1e-3, 1e-1), init=["xavier_uniform", "he_normal"])),
    ],
}  # fmt: skip


def judged(problem: Problem, seed: int) -> tuple[bool, Run]:
    """(whether the verdict is right, the run) on one problem."""
    X, y = problem.draw(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = tune(X, y, random_state=seed, progress=False, **problem.settings)
    return problem.right(run), run


def suite(kinds: list[str], each: int, first: int, out: Path | None) -> float:
    """The share of right verdicts; the seeds of a kind go round its problems."""
    part = Part(out, "suite", {"first_seed": first})
    for kind in kinds:
        for number in range(each):
            found = part.piece(f"{kind} {first + number}", _one, KINDS[kind], number, first + number)
            told = f"{'right' if found['right'] else 'WRONG'} {found['cpu_seconds']:6.1f} CPU-s"
            print(f"{kind:<13} {first + number} {told}", *found.get("verdicts", []), sep="\n    ", flush=True)
    rights: dict[str, list[bool]] = {}
    for name, found in part.pieces.items():
        rights.setdefault(name.rsplit(" ", 1)[0], []).append(found["right"])
    flat = [right for own in rights.values() for right in own]
    rate = float(np.mean(flat))
    part.summary({"problems": len(flat), "rate": rate, "right": {kind: sum(own) for kind, own in rights.items()}})
    print(f"right: {sum(flat)} of {len(flat)} ({rate:.1%})")
    return rate


def _one(problems: list[Problem], number: int, seed: int) -> dict[str, Any]:
    start = time.process_time()
    right, run = judged(problems[number % len(problems)], seed)
    found: dict[str, Any] = {"right": right, "cpu_seconds": round(time.process_time() - start, 2)}
    return found if right else {**found, "verdicts": [verdict.text for verdict in run.verdicts[:6]]}


LADDER: dict[str, tuple[Draw, bool]] = {
    "linear numbers": (lambda seed: linear_numbers(300, 6, seed), True),
    "linear classes": (lambda seed: linear_classes(300, 6, seed), True),
    "spirals": (lambda seed: spirals(400, seed), False),
    "moons": (lambda seed: make_moons(400, noise=0.2, random_state=seed), False),
    "friedman1": (lambda seed: make_friedman1(400, noise=1.0, random_state=seed), False),
}


def ladder(seeds: int, first: int, out: Path | None) -> dict[str, float]:
    """The share of seeds whose ladder stops at no hidden layer."""
    part = Part(out, "ladder", {"first_seed": first, "seeds": seeds})
    stopped: dict[str, float] = {}
    for name, (draw, wanted) in LADDER.items():
        found = [part.piece(f"{name} {seed}", _climb, draw, seed)["layers"] for seed in range(first, first + seeds)]
        stopped[name] = float(np.mean([layers == 0 for layers in found]))
        count = found.count(0)
        print(
            f"ladder, {name:<15} 0 layers in {count} of {seeds} seeds; wanted: {'all' if wanted else 'none'}",
            flush=True,
        )
    part.summary({"stopped_at_0": stopped})
    return stopped


def _climb(draw: Draw, seed: int) -> dict[str, Any]:
    X, y = draw(seed)
    start = time.process_time()
    run = tune(X, y, strategy="constructive", budget="20 trials", random_state=seed, progress=False)
    return {"layers": len(run.winner.hidden), "cpu_seconds": round(time.process_time() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--each", type=int, default=PER_KIND)
    parser.add_argument("--ladder", type=int, default=0)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.each:
        suite([kind for kind in options.kinds.split(",") if kind], options.each, options.first_seed, options.out)
    if options.ladder:
        ladder(options.ladder, options.first_seed, options.out)


if __name__ == "__main__":
    main()
