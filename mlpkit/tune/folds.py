"""Which rows train, validate and test in each fold: drawn once, the same for every candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

VALIDATION_SHARE = 0.15


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold. train and validation together are all rows outside test; the three never overlap."""

    train: Rows
    validation: Rows
    test: Rows


def make_folds(target: npt.NDArray[Any], folds: int, seed: int, *, stratify: bool) -> list[Fold]:
    """Deal the rows into ``folds`` test parts (class by class if ``stratify``), and part of the rest to validation."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    part = _deal(target, folds, rng, stratify)
    result = []
    for number in range(folds):
        rest = np.flatnonzero(part != number)
        train, validation = split(target, rest, rng, stratify=stratify)
        result.append(Fold(train, validation, np.flatnonzero(part == number)))
    return result


def split(target: npt.NDArray[Any], rows: Rows, rng: np.random.Generator, *, stratify: bool) -> tuple[Rows, Rows]:
    """Cut ``rows`` into (train, validation); a class with a single row stays in train."""
    groups = [rows[target[rows] == label] for label in np.unique(target[rows])] if stratify else [rows]
    validation: list[Rows] = []
    carry = 0.0  # Shares below one row add up over the classes, so that small classes are not always left out.
    for group in groups:
        wanted = VALIDATION_SHARE * len(group) + carry
        count = min(round(wanted), len(group) - 1)
        carry = wanted - count
        validation.append(rng.permutation(group)[:count])
    chosen = np.sort(np.concatenate(validation))
    return np.setdiff1d(rows, chosen), chosen


def _deal(target: npt.NDArray[Any], folds: int, rng: np.random.Generator, stratify: bool) -> Rows:
    # Going round the folds without a restart between classes keeps the parts equal in size within one row,
    # and puts a class with fewer rows than folds into different parts.
    labels = target if stratify else np.zeros(len(target))
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    order = np.concatenate([rng.permutation(group) for group in groups])
    part = np.empty(len(target), dtype=np.int64)
    part[order] = np.arange(len(target)) % folds
    return part
