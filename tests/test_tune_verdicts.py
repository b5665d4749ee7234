"""A sample of the problems of known truth in benchmarks/verdicts.py; the whole suite runs there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import verdicts


@pytest.mark.parametrize("kind", ["no signal", "leak", "linear", "underfit", "overfit", "border", "volatile", "robust"])
def test_the_verdict_on_a_problem_of_known_truth_is_right(kind):
    right, run = verdicts.judged(verdicts.KINDS[kind][0], seed=100)
    assert right, [verdict.text for verdict in run.verdicts]


def test_there_are_sixty_problems():
    assert len(verdicts.KINDS) * verdicts.PER_KIND == 60


def test_a_wrong_verdict_is_seen_to_be_wrong():
    right, _ = verdicts.judged(
        verdicts.Problem("linear", verdicts.noise, lambda run: verdicts.value_of(run, "fit") == "fine", verdicts.AUTO),
        seed=100,
    )
    assert not right
