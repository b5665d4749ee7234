"""Tables of the tuning benchmarks, generated or scikit-learn's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import datasets

Table = tuple[Any, Any]


def linear_numbers(rows: int, columns: int, seed: int) -> Table:
    """A weighted sum with as much noise as a third of its spread."""
    rng = np.random.default_rng(seed)
    X, weight = rng.normal(size=(rows, columns)), rng.normal(size=columns)
    y = X @ weight
    return X, y + np.std(y) / 3 * rng.normal(size=rows)


def linear_classes(rows: int, columns: int, seed: int) -> Table:
    """Two classes drawn by a logistic law of a weighted sum."""
    rng = np.random.default_rng(seed)
    X, weight = rng.normal(size=(rows, columns)), rng.normal(size=columns)
    return X, (rng.random(rows) < 1 / (1 + np.exp(-3 * X @ weight))).astype(int)


def spirals(rows: int, seed: int) -> Table:
    """Two interleaved spirals of one and a half turns, with a little noise."""
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % 2
    angle = 3 * np.pi * np.sqrt(rng.uniform(0.02, 1, rows))
    turned = angle + np.pi * label
    X = angle[:, None] * np.column_stack([np.cos(turned), np.sin(turned)]) + 0.3 * rng.normal(size=(rows, 2))
    return X, label


def development() -> dict[str, Table]:
    """The tables that were at hand while this was built, by name."""
    found: dict[str, Table] = {
        name: getattr(datasets, f"load_{name}")(return_X_y=True)
        for name in ("digits", "breast_cancer", "wine", "diabetes", "iris")
    }
    found["friedman1"] = datasets.make_friedman1(500, noise=1.0, random_state=0)
    found["moons"] = datasets.make_moons(500, noise=0.25, random_state=0)
    found["spirals"] = spirals(500, 0)
    return found
