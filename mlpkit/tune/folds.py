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


def make_folds(
    target: npt.NDArray[Any], folds: int, seed: int, *, stratify: bool, groups: npt.NDArray[Any] | None = None,
    order: npt.NDArray[Any] | None = None,
) -> list[Fold]:  # fmt: skip
    """Deal the rows into ``folds`` test parts (class by class if ``stratify``), and part of the rest to validation.

    groups: rows of one group stay together in every part. order: a time of each row; the test part of fold f is then a
    later block than all rows it learns from, and validation the last of those; the first block is never tested.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    if order is not None:
        return _time_folds(order, folds)
    part = _deal(target, folds, rng, stratify) if groups is None else _deal_groups(groups, folds, rng)
    result = []
    for number in range(folds):
        rest = np.flatnonzero(part != number)
        if groups is None:
            train, validation = split(target, rest, rng, stratify=stratify)
        else:
            train, validation = _split_groups(groups, rest, rng)
        result.append(Fold(train, validation, np.flatnonzero(part == number)))
    return result


def _time_folds(order: npt.NDArray[Any], folds: int) -> list[Fold]:
    rows = np.argsort(order, kind="stable")
    blocks = np.array_split(rows, folds + 1)
    result = []
    for number in range(folds):
        past = np.concatenate(blocks[: number + 1])
        cut = len(past) - max(1, round(VALIDATION_SHARE * len(past)))
        result.append(Fold(np.sort(past[:cut]), np.sort(past[cut:]), np.sort(blocks[number + 1])))
    return result


def _deal_groups(groups: npt.NDArray[Any], folds: int, rng: np.random.Generator) -> Rows:
    """Each group to the part with the fewest rows so far, the large groups first."""
    _, number, size = np.unique(groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(size))
    order = order[np.argsort(-size[order], kind="stable")]
    filled = np.zeros(folds, dtype=np.int64)
    part_of_group = np.empty(len(size), dtype=np.int64)
    for group in order:
        part_of_group[group] = np.argmin(filled)
        filled[part_of_group[group]] += size[group]
    part: Rows = part_of_group[number]
    return part


def _split_groups(groups: npt.NDArray[Any], rows: Rows, rng: np.random.Generator) -> tuple[Rows, Rows]:
    names = rng.permutation(np.unique(groups[rows]))
    wanted, chosen, count = VALIDATION_SHARE * len(rows), [], 0
    for name in names[:-1]:  # One group at least is left to learn from.
        if count >= wanted:
            break
        chosen.append(name)
        count += int((groups[rows] == name).sum())
    held = np.isin(groups[rows], chosen)
    return rows[~held], rows[held]


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
