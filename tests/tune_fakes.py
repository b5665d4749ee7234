"""A trainer that trains nothing: scores come from a planted formula of the spec, so that searches cost no time."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pandas as pd
import torch

from mlpkit.tune import trainer
from mlpkit.tune.budget import Clock, read_budget
from mlpkit.tune.evaluate import Search
from mlpkit.tune.folds import make_folds
from mlpkit.tune.problem import read_problem
from mlpkit.tune.progress import Silent
from mlpkit.tune.space import Space
from mlpkit.tune.trainer import Outcome


def table(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"a": rng.normal(size=rows), "b": rng.normal(size=rows)})
    frame["label"] = np.where(rng.permutation(rows) % 2 == 0, "no", "yes")
    return frame


class FakeTrainer:
    """Stands for ``trainer.train_members``: ``quality(spec)`` is the accuracy, ``noise`` its spread over the folds.

    hits: also give outputs of the test rows that are right as often as the score says.
    """

    def __init__(self, quality, *, noise=0.0, seconds=0.0, hits=False, rise=0.0):
        self.quality, self.noise, self.seconds, self.hits, self.rise = quality, noise, seconds, hits, rise
        self.calls, self.specs = [], []

    def __call__(
        self, specs, folds, out_features, *, deadline=math.inf, keep_at_deadline=False, on_fold=None, first_fold=0,
        clock=None, threads=None,
    ):  # fmt: skip
        self.calls.append(len(specs))
        self.specs += specs
        return [[self.outcome(spec, fold, first_fold + at) for at, fold in enumerate(folds)] for spec in specs]

    def outcome(self, spec, fold, number):
        rng = np.random.default_rng([number, zlib.crc32(repr(spec).encode())])
        score = self.quality(spec) + self.noise * rng.normal()
        if not math.isfinite(score):
            return Outcome(stopped="diverged")
        best = [1.0, 0.5, 0.5 + self.rise * (1 + 0.1 * number)]
        outcome = Outcome(score, min(1.0, score + 0.05), 1, "patience", self.seconds, [1.0, 0.5, 0.4], best)
        if self.hits:
            right = torch.from_numpy(rng.random(len(fold.test.y)) < score)
            said = torch.where(right, fold.test.y, 1 - fold.test.y)
            outcome.output = torch.nn.functional.one_hot(said, 2).float()
            outcome.score = float(right.double().mean())
        return outcome


def searching(monkeypatch, quality, *, space=None, budget="200 trials", rows=60, cv=5, seed=0, **fake):
    """(Search, its FakeTrainer) over a small table of two classes."""
    faked = FakeTrainer(quality, **fake)
    monkeypatch.setattr(trainer, "train_members", faked)
    frame = table(rows)
    problem = read_problem(frame, "label", "auto", cv)
    folds = make_folds(problem.target.values, cv, seed, stratify=True)
    wanted = (space or Space()).for_task("classification")
    return Search(problem, folds, wanted, seed, Clock(read_budget(budget)), Silent()), faked
