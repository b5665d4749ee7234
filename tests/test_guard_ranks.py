"""Guarded steps of two ranks, DDP and FSDP2: one decision, the guilty rank named, and a checkpoint when one dies."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guard_runs import all_finite, assert_same_bits
from torch import nn

from mlpkit.guard import Snapshot
from mlpkit.guard.ranks import Ranks, local, unwrapped

HERE = Path(__file__).parent
WRAPS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two ranks, which ran once for all tests here, left what they saw."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "guard_ranks.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(path)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 3], "\n".join(errors)
    return path


@pytest.fixture(scope="module")
def seen(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


CASES = {
    "inputs": ("inputs", "inputs", "data"),
    "gradient": ("0.weight", "gradient", "gradient"),
    "buffer": ("1.running_var", "buffer", "collapse"),
    "accumulated": ("inputs", "inputs", "data"),
    "unproven optimizer": ("0.weight", "gradient", "gradient"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_fault_on_one_rank_is_skipped_by_all_and_that_rank_is_named(wrap, case, seen):
    ranks = [one[wrap, case] for one in seen]
    for one in ranks:
        assert all(one["skipped"])
        assert one["records"] == 1
        assert (one["record"]["culprit"], one["record"]["where"], one["record"]["nature"]) == CASES[case]
        assert one["record"]["rank"] == 1
        assert_same_bits(one["after"], one["before"])
        assert_same_bits(one["end"], one["twin"])
        assert all_finite(one["end"])
    assert ranks[0]["record"] == ranks[1]["record"]
    assert ranks[0]["norms"] == ranks[1]["norms"]
    if wrap == "ddp":
        parameters = [{name: one["end"][name] for name in one["end"] if "running" not in name} for one in ranks]
        assert_same_bits(*parameters)


def test_sharded_and_replicated_runs_clip_by_the_same_norm(seen):
    for case in ("inputs", "gradient"):
        norms = [seen[0][wrap, case]["norms"] for wrap in WRAPS]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("wrap", WRAPS)
def test_accumulation_reduces_gradients_once_as_the_loop_by_hand_does(wrap, seen):
    for one in seen:
        assert_same_bits(one[wrap, "accumulation"]["run"], one[wrap, "accumulation"]["bare"])


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_scaler_asks_all_ranks_too(wrap, seen):
    for one in seen:
        found = one[wrap, "scaler"]
        assert [record["rank"] for record in found["records"]] == [1]
        assert found["records"][0]["culprit"] == "0.weight"
        assert_same_bits(found["states"][1], found["states"][0])
        assert not torch.equal(found["states"][2]["0.weight"], found["states"][1]["0.weight"])
        assert found["scale"] == 32768.0


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_bad_loss_of_one_rank_holds_the_scale_of_all(wrap, seen):
    ranks = [one[wrap, "scaler, bad loss"] for one in seen]
    assert ranks[0]["records"] == ranks[1]["records"]
    assert [(record["rank"], record["nature"]) for record in ranks[0]["records"]] == [(1, "collapse")]
    assert [found["scale"] for found in ranks] == [65536.0, 65536.0]


def test_a_clean_step_costs_one_all_reduce_of_one_number_and_one_for_the_norm_of_shards(seen):
    for one in seen:
        assert one["ddp", "reductions"] == [1]
        assert one["fsdp", "reductions"] == [1, 1]


@pytest.mark.parametrize("wrap", WRAPS)
def test_each_rank_resumes_from_its_file_bit_for_bit(wrap, seen):
    for one in seen:
        assert_same_bits(one[wrap, "resumed"]["run"], one[wrap, "resumed"]["fresh"])


def test_a_rank_killed_in_the_middle_of_a_step_leaves_every_rank_a_checkpoint_of_the_same_step(folder):
    assert (folder / "survivor.txt").read_text()  # the other rank was told, not left waiting
    for rank in (0, 1):
        snapshot = Snapshot.load(folder / f"fsdp.rank{rank}.pt")
        last = torch.load(folder / f"fsdp.{rank}.last.pt", weights_only=True)
        assert snapshot.step == 3
        for name, value in snapshot.state["model"].items():
            assert_same_bits(value, last[name])
    assert not list(folder.glob(".*"))  # nothing half-written


def test_a_model_of_this_process_alone_asks_nobody():
    model = torch.compile(nn.Linear(2, 2), backend="eager")
    ranks = Ranks(model)
    assert (ranks.alone, ranks.size, ranks.rank) == (True, 1, 0)
    assert ranks.decide(True)
    assert not ranks.decide(False)
    assert ranks.common("found") == "found"
    assert isinstance(unwrapped(model), nn.Linear)
    assert local(unwrapped(model).weight) is unwrapped(model).weight
