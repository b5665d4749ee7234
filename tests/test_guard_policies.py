"""What follows a skip: errors, the way back to a snapshot, a step in float32, an end to skips in a row."""

import collections
import copy
import math
import os
import zipfile

import numpy as np
import pytest
import torch
from guard_runs import OPTIMIZERS, Run, assert_same_bits, gradient_of, inf_in_one_element, poison
from torch import nn

from mlpkit.errors import ArgumentError, DataError, NonFiniteError, OutputError
from mlpkit.guard import History, LossScale, Snapshot, TrainStep
from mlpkit.guard.snapshot import _restore_optimizer
from mlpkit.trace import Tracer

PARTS = slice(0, 3)  # of Run.state(): all but the random numbers


def bad(run, value=torch.nan):
    x, y = run.batch()
    return run.step(poison(value)(x), y)


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


class Grows(nn.Module):
    """Overflows in float16, and is fine in float32."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.norm(self.linear(x))) * 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_collapse_is_taken_in_float32_where_asked_for(accumulate):
    def run(precision, x, **options):
        torch.manual_seed(5)
        model = Grows()
        step = TrainStep(
            model,
            "mse",
            torch.optim.Adam(model.parameters(), lr=0.1),
            precision=precision,
            accumulate=accumulate,
            **options,
        )
        results = [step(x, torch.zeros(8, 5)) for _ in range(accumulate)]
        return model, step, results

    torch.manual_seed(1)
    x = torch.randn(8, 5) * 3e5
    model, step, results = run("fp16", x, on_collapse="fp32_step")
    plain, _, _ = run("fp32", x)
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert not any(result.skipped for result in results)
    assert all(math.isfinite(result.loss) for result in results)
    record = step.records[0]
    assert (record.nature, record.action, record.taken) == ("collapse", "fp32 step", True)
    assert "Step taken in float32 instead" in str(record)
    assert (step.steps, step.skipped, step.scale) == (1, 0, 65536.0)
    skipped, other, _ = run("fp16", x)
    assert other.skipped == 1
    assert not torch.equal(skipped.linear.weight, model.linear.weight)


def test_the_step_in_float32_draws_no_more_random_numbers_and_may_fail_too():
    states = []
    for policy in ("skip", "fp32_step"):
        run = Run(precision="fp16", on_collapse=policy)
        run.take(1)
        before = run.state()
        x, y = run.batch()
        run.step(x * 1e30, y)
        states.append(run.state())
        assert_same_bits(run.state()[PARTS], before[PARTS])
    assert_same_bits(*states)
    assert "The step in float32 failed too" in str(run.step.records[0])


def test_collapse_and_calibration_are_told_apart():
    run = Run(precision="fp16", on_collapse="raise")
    with gradient_of(run.model[0].weight, inf_in_one_element):
        assert run.step(*run.batch()).record.nature == "calibration"
    x, y = run.batch()
    with pytest.raises(NonFiniteError, match=r"forward of 0 .*The forward itself held it: no loss scale can help"):
        run.step(x * 3e5, y)
    assert bad(run).record.nature == "data"  # nothing of the forward's doing


def test_a_record_knows_the_gradients_past_the_first_index_and_the_operation():
    run = Run(precision="fp16")
    run.take(2)
    with gradient_of(run.model[0].weight, inf_in_one_element):
        record = run.step(*run.batch()).record
    assert record.first_index == 2 * 5 + 1
    assert len(record.absmax) == 3
    assert all(math.isfinite(value) for value in record.absmax[:2])
    assert record.absmax[2] == math.inf
    assert record.op is None
    with Tracer(run.model):
        x, y = run.batch()
        record = run.step(x * 3e5, y).record
    assert (record.op, record.module, record.cause) == ("_to_copy", "0", "cast_overflow")
    assert "It began in _to_copy of 0." in str(record)


def test_headroom_is_in_bits_below_the_dtypes_limit():
    run = Run(precision="fp16", init_scale=1024.0)
    seen = {}
    handles = [
        p.register_hook(lambda g, n=n: seen.__setitem__(n, float(g.abs().max())))
        for n, p in run.model.named_parameters()
    ]
    run.take(1)
    for handle in handles:
        handle.remove()
    expected = {name: math.log2(65504 / value) for name, value in seen.items()}
    assert run.step.headroom == pytest.approx(expected, rel=1e-6)


def test_a_scale_so_low_that_every_gradient_is_flushed_to_zero_grows_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    step = TrainStep(
        model, lambda y, _: y.mean() * 1e-8, torch.optim.SGD(model.parameters(), 1.0), precision="fp16", init_scale=1.0
    )
    before = copy.deepcopy(model.state_dict())
    for _ in range(12):
        step(torch.randn(8, 4))
    assert {change.reason for change in step.scale_changes} == {"underflow"}
    assert 1.0 < step.scale < 2.0**12  # until some of them were there again, and no further
    assert not torch.equal(model[1].weight, before["1.weight"])


# Snapshots.


@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_from_a_file_bit_for_bit(optimizer, name, tmp_path):
    run = Run(optimizer, precision="fp16", init_scale=LossScale(512.0, growth_interval=4))
    run.take(3)
    path = Snapshot.take(run.step).save(tmp_path / "deep" / name)
    run.take(4)
    fresh = Run(optimizer, precision="fp16", init_scale=LossScale(512.0, growth_interval=4))
    torch.manual_seed(99)
    Snapshot.load(path).restore(fresh.step)
    for _ in range(3):
        fresh.batch()
    assert fresh.step.steps == 3
    fresh.take(4)
    assert_same_bits(fresh.state(), run.state())
    assert fresh.step.scale == run.step.scale == 1024.0


def test_state_dicts_alone_resume_bit_for_bit_too():
    run, fresh = Run("adam", max_consecutive_skips=3), Run("adam", max_consecutive_skips=3)
    run.take(2)
    bad(run)
    bad(run)
    parts = ("model", "optimizer", "scheduler", "step")
    saved = {part: copy.deepcopy(getattr(run, part).state_dict()) for part in parts}
    for part in parts:
        getattr(fresh, part).load_state_dict(saved[part])
    fresh.data.set_state(run.data.get_state())
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        bad(fresh)
    draws = torch.get_rng_state()
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        bad(run)
    torch.set_rng_state(draws)
    run.take(2)
    torch.set_rng_state(draws)
    fresh.take(2)
    assert_same_bits(fresh.state(), run.state())


@pytest.mark.parametrize(("scale", "brought_to"), [(4096.0, 2048.0), (2.0, 16.0), (512.0, 512.0)])
def test_a_scale_that_is_loaded_is_brought_within_its_bounds(scale, brought_to):
    run = Run(precision="fp16", init_scale=LossScale(1024.0, floor=16.0, ceiling=2048.0))
    run.step.load_state_dict({**run.step.state_dict(), "scale": scale})
    assert run.step.scale == brought_to


def test_a_write_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    run = Run("adam")
    path = tmp_path / "run.pt"
    Snapshot.take(run.step).save(path)
    older = path.read_bytes()
    run.take(1)
    monkeypatch.setattr(
        torch, "save", lambda state, file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OutputError, match=r"cannot write .*run\.pt: No space left on device"):
        Snapshot.take(run.step).save(path)
    assert path.read_bytes() == older
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_file_that_is_no_snapshot_is_refused(tmp_path):
    for name, content in [("a.pt", b"nonsense"), ("b.pt", b""), ("c.safetensors", b"\x08" + bytes(7) + b"{}      ")]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"Snapshot\.load"):
            Snapshot.load(path)
    torch.save({"other": 1}, tmp_path / "d.pt")
    with pytest.raises(DataError, match="not a snapshot of version 1"):
        Snapshot.load(tmp_path / "d.pt")
    torch.save(Run, tmp_path / "e.pt")  # an object by name: would run code
    with pytest.raises(DataError, match="cannot be read"):
        Snapshot.load(tmp_path / "e.pt")
    with pytest.raises(DataError, match="cannot be read"):
        Snapshot.load(tmp_path / "absent.pt")


def test_a_snapshot_of_another_model_is_refused_before_anything_changes():
    run = Run("adam")
    run.take(1)
    snapshot = Snapshot.take(run.step)
    other = nn.Linear(5, 3)
    step = TrainStep(other, "mse", torch.optim.Adam(other.parameters()))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ArgumentError, match=r"another model; '0\.bias' does not fit"):
        snapshot.restore(step)
    assert_same_bits(other.state_dict(), before)
    groups = [{"params": [p]} for p in run.model.parameters()]
    optimizer = torch.optim.Adam(groups)
    regrouped = TrainStep(run.model, "mse", optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    with pytest.raises(ArgumentError, match="other parameters or groups"):
        snapshot.restore(regrouped)


def parts(optimizer="Adam", scheduler=None, dtype=torch.float32, reverse=False):
    torch.manual_seed(0)
    model = nn.Linear(3, 3, dtype=dtype)
    parameters = list(model.parameters())
    made = getattr(torch.optim, optimizer)(parameters[::-1] if reverse else parameters, lr=0.1)
    scheduler = scheduler and getattr(torch.optim.lr_scheduler, scheduler)(made, 2)
    step = TrainStep(model, "mse", made, scheduler=scheduler)
    step(torch.ones(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype))
    return step


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"optimizer": "SGD"}, "another optimizer: it was Adam and is SGD"),
        ({"scheduler": "StepLR"}, {"scheduler": "CosineAnnealingLR"}, "it was StepLR and is CosineAnnealingLR"),
        ({}, {"scheduler": "StepLR"}, "another scheduler: it was none and is StepLR"),
        ({"scheduler": "StepLR"}, {}, "another scheduler: it was StepLR and is none"),
        ({"dtype": torch.float64}, {}, r"another dtype; 'weight' was torch\.float64 and is torch\.float32"),
        ({}, {"reverse": True}, "parameters in another order; 'weight' was where 'bias' is"),
    ],
)
def test_a_snapshot_of_another_run_is_refused_before_anything_changes(before, now, message):
    snapshot, step = Snapshot.take(parts(**before)), parts(**now)
    step(torch.ones(2, 3), torch.zeros(2, 3))
    state = copy.deepcopy([step.model.state_dict(), step.optimizer.state_dict(), step.state_dict()])
    with pytest.raises(ArgumentError, match=message):
        snapshot.restore(step)
    assert_same_bits([step.model.state_dict(), step.optimizer.state_dict(), step.state_dict()], state)


@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
def test_numpy_numbers_and_counters_come_back_from_a_file(name, tmp_path):
    def run():
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.5))
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
        return TrainStep(model, "mse", optimizer, scheduler=scheduler)

    step, fresh = run(), run()
    step(torch.ones(1, 3), torch.ones(1, 2))
    Snapshot.load(Snapshot.take(step).save(tmp_path / name)).restore(fresh)
    assert type(fresh.optimizer.param_groups[0]["lr"]) is float
    assert fresh.scheduler.milestones == collections.Counter([2, 4])
    rates = []
    for _ in range(4):
        fresh(torch.ones(1, 3), torch.ones(1, 2))
        rates.append(fresh.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005])


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
@pytest.mark.parametrize("value", [Pair(1, 2), torch.float32, {"inner": {3}}])
def test_a_setting_that_a_file_cannot_hold_is_refused_by_name_and_kept_in_memory(value, name, tmp_path):
    step = parts()
    step.optimizer.param_groups[0]["extra"] = value
    snapshot = Snapshot.take(step)
    step.optimizer.param_groups[0]["extra"] = None
    snapshot.restore(step)
    assert step.optimizer.param_groups[0]["extra"] == value
    assert type(step.optimizer.param_groups[0]["extra"]) is type(value)
    with pytest.raises(ArgumentError, match=r"Snapshot\.save: optimizer\['groups'\]\[0\]\['extra'\].* is a "):
        snapshot.save(tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
def test_a_disk_that_takes_no_more_is_an_output_error_and_the_older_file_stays(name, tmp_path):
    resource = pytest.importorskip("resource")
    step = parts()
    path = Snapshot.take(step).save(tmp_path / name)
    older = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            Snapshot.take(step).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == older
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_file_has_the_mode_that_the_umask_allows(name, tmp_path):
    before = os.umask(0o077)
    try:
        path = Snapshot.take(parts()).save(tmp_path / name)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
def test_a_damaged_file_is_a_data_error(name, tmp_path):
    path = Snapshot.take(parts()).save(tmp_path / name)
    whole = path.read_bytes()
    for damaged in (b"nonsense " * 20, whole[: len(whole) // 2], whole[:40] + b"\xff" * 40 + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"Snapshot\.load"):
            Snapshot.load(path)


def test_a_pickle_that_ends_at_once_is_a_data_error(tmp_path):
    path = Snapshot.take(parts()).save(tmp_path / "run.pt")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"\x80\x02." if name.endswith("data.pkl") else content)
    with pytest.raises(DataError, match="cannot be read"):
        Snapshot.load(path)


def test_a_file_that_lacks_a_part_is_a_data_error_when_it_is_loaded(tmp_path):
    whole = Snapshot.take(parts()).state
    for part in ("model", "optimizer", "scheduler", "step", "random"):
        torch.save({key: value for key, value in whole.items() if key != part}, tmp_path / "run.pt")
        with pytest.raises(DataError, match=f"it has no {part}"):
            Snapshot.load(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("settings", "device"), [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")]
)
def test_the_step_count_of_fused_and_capturable_groups_lies_where_the_parameter_does(settings, device):
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.Adam([parameter])
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    saved = {"state": [{"step": torch.tensor(2.0)}], "groups": [{**group, **settings}]}
    _restore_optimizer(optimizer, saved)
    assert optimizer.state[parameter]["step"].device.type == device
    optimizer.state[parameter]["step"] = torch.tensor(1.0)
    _restore_optimizer(optimizer, saved)
    assert optimizer.state[parameter]["step"].device.type == device


def test_a_snapshot_under_ddp_fits_the_plain_model_and_the_reverse():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain, other = nn.Linear(3, 2), nn.Linear(3, 2)
        wrapped = nn.parallel.DistributedDataParallel(other)
        steps = [TrainStep(one, "mse", torch.optim.SGD(one.parameters(), 0.1)) for one in (plain, wrapped)]
        Snapshot.take(steps[1]).restore(steps[0])
        assert_same_bits(plain.state_dict(), other.state_dict())
        steps[0](torch.ones(2, 3), torch.ones(2, 2))
        Snapshot.take(steps[0]).restore(steps[1])
        assert_same_bits(plain.state_dict(), other.state_dict())
    finally:
        torch.distributed.destroy_process_group()


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
