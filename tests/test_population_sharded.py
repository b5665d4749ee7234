"""A population over two processes: dealt out by cost, and to the last bit what one process has."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from population_cases import classes_table
from population_ranks import SETTINGS, members

from mlpkit.errors import ArgumentError
from mlpkit.population import Member, Population
from mlpkit.population.sharded import ShardedPopulation, cost, dealt

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two processes, which ran once for all tests here, saw."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "population_ranks.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole():
    return Population(members(), *classes_table(), **SETTINGS).fit()


def test_all_processes_know_what_one_would(seen, whole):
    X, _ = classes_table()
    curves = {index: [score.train_loss, score.metric] for index, score in whole.scores.items()}
    for one in seen:
        assert one["curves"] == curves
        assert one["ranking"] == whole.ranking()
        assert torch.equal(one["outputs"], whole.predict(X, ids=[3, 0, 3, 5]))
        assert torch.equal(one["all"], whole.predict(X, weights="last"))
        for name, tensor in whole.export(4).state_dict().items():
            assert torch.equal(one["exported"][name], tensor), name


def test_every_member_has_one_owner_and_steps_are_counted_once(seen, whole):
    count = len(whole.members)
    assert seen[0]["owners"] == seen[1]["owners"]
    assert seen[0]["own"] + seen[1]["own"] == count
    assert min(seen[0]["own"], seen[1]["own"]) > 0
    for one in seen:
        assert one["alive"] == [list(range(count)), []]
        assert one["steps"] == sum(score.steps for score in whole.scores.values()) / 2


def test_the_dearest_go_first_to_whoever_has_least():
    assert dealt([1.0, 5.0, 3.0, 3.0], 2) == [0, 0, 1, 1]
    assert dealt([], 3) == []
    X = torch.empty(1000, 20)
    small, wide, long = Member(hidden=(8,)), Member(hidden=(256, 256)), Member(hidden=(8,), epochs=300)
    assert cost(small, X) < cost(long, X)
    assert cost(small, X) < cost(wide, X)
    assert cost(Member(rows=torch.arange(10)), X) < cost(Member(), X)


def test_one_process_has_all_members():
    X, y = classes_table()
    alone = ShardedPopulation(members()[:3], X, y, **SETTINGS).fit()
    whole = Population(members()[:3], X, y, **SETTINGS).fit()
    assert alone.size == 1
    assert alone.scores == whole.scores
    assert torch.equal(alone.predict(X), whole.predict(X))
    with pytest.raises(ArgumentError, match="there is no member 9"):
        alone.export(9)
    with pytest.raises(ArgumentError, match="members holds int"):
        ShardedPopulation([1], X, y, **SETTINGS)
