"""What follows a skip: errors, the way back to a snapshot, an end to skips in a row."""

import copy

import pytest
import torch
from guard_runs import OPTIMIZERS, PARTS, Run, assert_same_bits, bad
from torch import nn

from mlpkit.errors import ArgumentError, NonFiniteError, OutputError
from mlpkit.guard import History, LossScale, Snapshot, TrainStep


@pytest.mark.parametrize("where", ["memory", "run.pt", "run.safetensors"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rollback_goes_back_to_the_last_good_snapshot_bit_for_bit(optimizer, where, tmp_path):
    path = None if where == "memory" else tmp_path / where
    run = Run(optimizer, on_nonfinite="rollback", snapshot_every=3, snapshot_path=path)
    run.take(3)
    good = run.state()[PARTS]
    run.take(2)
    result = bad(run)
    assert result.skipped
    assert result.record.action == "rollback to step 3"
    assert str(result.record).endswith("Rollback to step 3.")
    assert_same_bits(run.state()[PARTS], good)
    assert run.step.records == [result.record]
    assert run.step.steps == 6  # counters go on: what was tried was tried
    run.take(2)


def test_rollback_heals_state_that_was_bad_before_the_step():
    run = Run("adam", on_nonfinite="rollback", snapshot_every=2)
    run.take(2)
    good = run.state()[PARTS]
    run.take(1)
    run.optimizer.state[run.model[0].bias]["exp_avg"][1] = torch.nan
    record = run.step(*run.batch()).record
    assert (record.where, record.nature) == ("state", "state")
    assert record.culprit == "optimizer state 'exp_avg of 0.bias'"
    assert "before the step, optimizer state 'exp_avg of 0.bias' held 1 NaN" in str(record)
    assert_same_bits(run.state()[PARTS], good)
    run.take(1)


def test_no_snapshot_is_taken_of_a_run_that_is_already_bad(tmp_path):
    run = Run("adam", on_nonfinite="rollback", snapshot_every=1)
    run.take(2)
    good = run.state()[PARTS]
    run.take(1)
    run.model[4].bias.data[0] = torch.inf
    assert run.step(*run.batch()).record.action == "rollback to step 2"
    assert_same_bits(run.state()[PARTS], good)


class Masked(nn.Module):
    """A buffer holds -Inf on purpose."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

    def forward(self, x):
        return (self.linear(x) + self.mask).softmax(1)


def test_a_buffer_of_inf_on_purpose_does_not_stand_in_the_way_of_snapshots():
    model = Masked()
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), 0.1), on_nonfinite="rollback", snapshot_every=1)
    step(torch.randn(4, 5), torch.randn(4, 3))
    good = copy.deepcopy(model.state_dict())
    assert not Snapshot.take(step).finite
    assert step(torch.full((4, 5), torch.nan), torch.randn(4, 3)).record.action == "rollback to step 1"
    assert_same_bits(model.state_dict(), good)


def test_without_a_good_snapshot_a_rollback_is_an_error_and_no_older_file_is_read(tmp_path):
    path = tmp_path / "run.pt"
    older = Run("adam")
    older.take(2)
    Snapshot.take(older.step).save(path)
    run = Run("adam", on_nonfinite="rollback", snapshot_path=path)
    run.step._aftermath._keeper.offer = lambda steps: None
    run.take(1)
    before = run.state()[PARTS]
    with pytest.raises(NonFiniteError, match=r"Step 1: the inputs hold 1 NaN.*no good snapshot of this run"):
        bad(run)
    assert_same_bits(run.state()[PARTS], before)


def test_a_snapshot_that_could_not_be_saved_does_not_count(tmp_path):
    path = tmp_path / "run.pt"
    path.mkdir()
    run = Run(on_nonfinite="rollback", snapshot_path=path)
    for _ in range(2):
        with pytest.raises(OutputError):
            run.take(1)
    path.rmdir()
    run.take(1)
    assert bad(run).record.action == "rollback to step 0"


def test_a_late_rollback_is_told_by_the_record_of_the_skip():
    history = History()
    run = Run(on_nonfinite="rollback", check_every=3, history=history)
    run.take(1)
    bad(run)
    run.take(1)
    assert [record.action for record in run.step.records] == ["rollback to step 0"]
    assert [row["action"] for row in history] == [None, "rollback to step 0", None]


def test_calibration_is_no_reason_to_go_back():
    scale = LossScale(2.0**30, ceiling=2.0**30)
    run = Run(precision="fp16", on_nonfinite="rollback", init_scale=scale, snapshot_every=1)
    result = run.step(*run.batch())
    assert (result.record.nature, result.record.action) == ("calibration", "")
    assert run.step.scale == 2.0**29


def test_native_steps_are_kept_and_brought_back_too():
    from mlpkit import nn as fused

    model = fused.MLP(5, (8,), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, "mse", optimizer, on_nonfinite="rollback", snapshot_every=2)
    states = []
    for _ in range(4):
        step(torch.randn(4, 5), torch.randn(4, 3))
        states.append(copy.deepcopy(model.state_dict()))
    assert step.path == "native"
    step(torch.full((4, 5), torch.nan), torch.randn(4, 3))
    assert step.records[0].action == "rollback to step 4"
    assert_same_bits(model.state_dict(), states[3])
    assert not step(torch.randn(4, 5), torch.randn(4, 3)).skipped


def test_too_many_skips_in_a_row_are_an_error_with_the_records():
    run = Run(max_consecutive_skips=3)
    run.take(1)
    for _ in range(2):
        bad(run)
    run.take(1)
    for _ in range(2):
        bad(run)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row were skipped .*Step 6: the inputs hold 1 NaN") as error:
        bad(run)
    assert [record.step for record in error.value.records] == [4, 5, 6]
    assert len(run.step.records) == 5


def test_check_every_lets_policies_act_late_but_never_the_step():
    run = Run(on_nonfinite="raise", check_every=3)
    run.take(1)
    before = run.state()[PARTS]
    assert bad(run).skipped
    assert_same_bits(run.state()[PARTS], before)
    with pytest.raises(NonFiniteError, match="Step 1: the inputs hold 1 NaN") as error:
        run.take(1)
    assert error.value.records == run.step.records
    run.take(3)


def test_a_row_of_skips_that_ended_before_the_check_is_an_error_too():
    run = Run(max_consecutive_skips=2, check_every=5)
    for _ in range(2):
        bad(run)
    run.take(1)
    bad(run)
    with pytest.raises(NonFiniteError, match="2 steps in a row") as error:
        run.take(1)
    assert [record.step for record in error.value.records] == [0, 1]
    run.take(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'; it must be one of skip, raise, rollback"),
        ({"on_collapse": "retry"}, "on_collapse is 'retry'; it must be one of skip, raise, fp32_step"),
        ({"on_collapse": "fp32_step"}, "wants precision 'fp16' or 'bf16', not 'fp32'"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips is 0; it must be an int of at least 1"),
        ({"check_every": 1.5}, r"check_every is 1\.5"),
        ({"snapshot_every": True}, "snapshot_every is True"),
        ({"snapshot_path": 7}, "snapshot_path is 7; it must be a path or None"),
    ],
)
def test_wrong_policies_are_refused_in_one_sentence(options, message):
    with pytest.raises(ArgumentError, match=message):
        Run(**options)
