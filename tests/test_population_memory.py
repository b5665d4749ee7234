"""What populations keep: the stated formula, and ten thousand members on digits."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from population_cases import classes_table, population

from mlpkit.population import Member


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"optimizer": "sgd"}, 1),
        ({"optimizer": "sgd", "momentum": 0.9}, 2),
        ({"optimizer": "rmsprop"}, 2),
        ({"optimizer": "adamw"}, 3),
    ],
)
@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize(("columns", "hidden"), [(6, (16, 5)), (64, (13,)), (40, (100,))])
def test_a_member_keeps_what_the_page_says(settings, copies, validated, columns, hidden):
    table = classes_table(columns=columns)
    member = Member(hidden=hidden, **settings)
    trained = population([member], table, validation=table if validated else None)
    widths = (columns, *hidden, 3)
    parameters = sum((a + 1) * b for a, b in pairwise(widths))
    tensors = 2 * (len(hidden) + 1)
    # A narrow first layer is kept with its outputs up to a multiple of 16, of which it has three quarters at least.
    most = parameters + columns * hidden[0] // 3 + 15 * tensors
    kept = trained._native.state(0).numel()
    assert (copies + validated) * parameters <= kept <= (copies + validated) * most


MANY = """
import resource, sys, torch
from sklearn.datasets import load_digits
from mlpkit.population import Member, Population

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
X, y = load_digits(return_X_y=True)
members = [Member(hidden=(16,), seed=seed, epochs=1) for seed in range(10_000)]
population = Population(members, X / 16, y, loss="cross_entropy", validation=0.2, progress=False)
population.fit()
assert all(score.status == "epochs" for score in population.scores.values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_ten_thousand_members_on_digits_take_less_than_four_gib():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    said = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert int(said.stdout) < 4096
