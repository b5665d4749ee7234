"""Snapshots of a run: resumed bit for bit, refused before anything changes, whole files or none."""

import collections
import copy
import os
import zipfile

import numpy as np
import pytest
import torch
from guard_runs import OPTIMIZERS, Run, assert_same_bits, bad
from torch import nn

from mlpkit.errors import ArgumentError, DataError, NonFiniteError, OutputError
from mlpkit.guard import LossScale, Snapshot, TrainStep
from mlpkit.guard.snapshot import _restore_optimizer


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
