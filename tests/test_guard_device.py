"""guard.optim and TrainStep where the device decides: what Python does with steps that it never reads."""

import copy
import math

import pytest
import torch
from torch import nn

from mlpkit import guard
from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DeviceError, ShapeError
from mlpkit.guard import scaler_steps
from mlpkit.guard.device import DeviceUpdate, Queued
from mlpkit.guard.policy import Policy
from mlpkit.guard.queued import QueuedStep
from mlpkit.ops.guarded_update import GroupSettings, Reason, guarded_update


class StandIn:
    """The native update of the CPU, with the answers and the log of one on a device."""

    def __init__(self, kind, rows, groups, state):
        self._inner = _C.HostUpdate(kind)
        self._inner.prepared([])
        self._log = torch.zeros(2 + 32 * 12, dtype=torch.float64)

    def step(self, groups, state, clip, scale, *rest):
        used = 1.0 if scale is None else float(scale)
        said = self._inner.step(groups, state, clip, scale, *rest, False, False)
        if said is None:
            return None
        said = said[:-1]  # a device does not unscale in place
        parameters = sum(len(group["params"]) for group in groups)
        census = torch.tensor(self._inner.census() or [(0.0,) * 5] * parameters, dtype=torch.float64)
        skips = int(self._log[1])
        if not said[0]:
            row = census[said[4]] if said[4] >= 0 else torch.zeros(5)
            numbers = [self._log[0].item(), *said[1:], used, *row.tolist()]
            self._log[2 + skips % 32 * 12 :][:12] = torch.tensor(numbers)
            self._log[1] += 1
        self._log[0] += 1
        return torch.tensor([float(number) for number in said], dtype=torch.float64), census

    def log(self):
        return self._log


@pytest.fixture
def on_device(monkeypatch):
    """Parameters on the CPU pass for those of a device."""
    monkeypatch.setattr(_C, "DeviceUpdate", StandIn)
    monkeypatch.setattr(guard.optim, "_decided_on_device", lambda _: True)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in (5, 3)]


def fill(ps, value=None):
    for p in ps:
        p.grad = torch.full_like(p, 0.5)
    if value is not None:
        ps[1].grad[2] = value


@pytest.mark.usefixtures("on_device")
def test_steps_are_queued_and_skips_told_from_the_log():
    ours, theirs = parameters(), parameters()
    one, twin = guard.optim.AdamW(ours), torch.optim.AdamW(theirs)
    for value in (None, math.nan, None, math.inf):
        fill(ours, value)
        one.step()
        if value is None:
            fill(theirs)
            twin.step()
    assert isinstance(one.__dict__["_outcome"], Queued)
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs))
    assert [(record.step, record.kind, record.culprit, record.first_index) for record in one.records] == [
        (1, "NaN", "group 0, parameter 1 (3,)", 2),
        (3, "Inf", "group 0, parameter 1 (3,)", 2),
    ]
    assert one.skipped == 2
    assert math.isinf(one.grad_norm)
    assert one.state[ours[0]]["step"].item() == 2


@pytest.mark.usefixtures("on_device")
def test_a_log_that_ran_over_still_counts():
    ours = parameters()
    one = guard.optim.SGD(ours, lr=0.1)
    for _ in range(40):
        fill(ours, math.nan)
        one.step()
    assert one.skipped == 40
    assert [record.step for record in one.records] == list(range(8, 40))


@pytest.mark.usefixtures("on_device")
def test_a_parameter_that_joins_late_keeps_the_count_of_steps():
    ours = parameters()
    one = guard.optim.SGD(ours, lr=0.1, momentum=0.9)
    fill(ours[:1])
    one.step()
    fill(ours, math.nan)
    one.step()
    assert [(record.step, record.culprit) for record in one.records] == [(1, "group 0, parameter 1 (3,)")]


@pytest.mark.usefixtures("on_device")
def test_force_writes_what_comes_and_a_wrong_setting_is_named_at_once():
    ours = parameters()
    one = guard.optim.SGD(ours, lr=0.1)
    fill(ours, math.nan)
    one.force()
    assert torch.isnan(ours[1][2])
    assert one.skipped == 0
    one.param_groups[0]["lr"] = math.nan
    with pytest.raises(ArgumentError, match="lr of parameter group 0 is nan"):
        one.step()


def make_step(norm=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 2))
    step = guard.TrainStep(model, "mse", guard.optim.Adam(model.parameters(), lr=0.05), clip_norm=1.0)
    return model, step


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.fill_(math.inf)
        return x


def queued(step):
    """The step as it is where its model is on a device."""
    step._queued = QueuedStep(step, Policy("TrainStep"))
    step._queued.never = None
    step._queued.why_not = "no step was taken yet"
    return step


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)) for _ in range(4)]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_queued_step_is_the_general_one(monkeypatch, value):
    model, step = make_step()
    queued(step)
    results = []
    for i, (x, y) in enumerate(batches()):
        if i == 2:
            before = [tensor.clone() for tensor in model.state_dict().values()]
            x = x.clone()
            x[3, 1] = value
        results.append(step(x, y))
        if i == 2:
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before))
    assert step.path == "queued"
    assert step.path_reason is None
    monkeypatch.undo()
    twin, plain = make_step()
    expected = [plain(x, y) for i, (x, y) in enumerate(batches()) if i != 2]
    assert plain.path == "general"
    taken = [result for result in results if not result.skipped]
    assert [one.loss for one in taken] == [one.loss for one in expected]
    assert [one.grad_norm for one in taken] == pytest.approx([one.grad_norm for one in expected], rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    assert (step.skipped, [record.step for record in step.records]) == (1, [2])
    assert results[2].culprit == "loss"


@pytest.mark.usefixtures("on_device")
def test_a_queued_step_names_a_parameter_and_a_buffer():
    model, step = make_step(norm=False)
    queued(step)
    x, y = batches()[0]
    model[0].weight.register_hook(lambda g: g.fill_(math.nan))
    result = step(x, y)
    assert (result.skipped, result.culprit, result.record.first_index) == (True, "0.weight", 0)
    model = nn.Sequential(nn.Linear(4, 2), Counter())
    step = queued(guard.TrainStep(model, "mse", guard.optim.SGD(model.parameters(), lr=0.05)))
    result = step(x, y)
    assert (result.skipped, result.record.where) == (True, "buffer")
    assert model[1].seen.item() == 0


@pytest.mark.usefixtures("on_device")
def test_an_error_inside_a_queued_step_leaves_nothing():
    model, step = make_step()
    queued(step)
    x, y = batches()[0]
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(ShapeError):
        step(x, y[:3])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_on_the_cpu_nothing_is_queued():
    _, step = make_step()
    assert step._queued.never == "the model is not on CUDA"
    one = DeviceUpdate(step.optimizer)
    assert one.queue(step.optimizer) is None


def test_the_op_says_which_devices_it_takes(monkeypatch):
    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("xpu")

    p = torch.zeros(3).as_subclass(Elsewhere)
    with pytest.raises(DeviceError, match="CPU or CUDA"):
        guarded_update([p], [torch.zeros(3)], kind="sgd", settings=[GroupSettings()], steps=[torch.zeros(())])
    assert Reason.TAKEN == 0


def run_in_fp16(queue):
    """Seven steps: the third has an Inf gradient, the fifth an Inf batch; scales, state and the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = guard.optim.Adam(model.parameters(), lr=0.05)
    scale = guard.LossScale(2.0**12, growth_interval=2, floor=2.0**10, ceiling=2.0**13)
    step = guard.TrainStep(model, "mse", optimizer, precision="fp16", clip_norm=1.0, init_scale=scale)
    if queue:
        queued(step)
    results, scales = [], []
    for i, (x, y) in enumerate([*batches(), *batches()[:3]]):
        handle = model[0].weight.register_hook(lambda g: g.fill_(math.inf)) if i == 2 else None
        results.append(step(x * math.inf if i == 4 else x, y))
        scales.append(step.scale)
        if handle:
            handle.remove()
    return results, scales, model.state_dict(), step


@pytest.mark.usefixtures("on_device")
def test_a_queued_step_in_fp16_moves_the_scale_as_the_general_one(monkeypatch):
    results, scales, state, step = run_in_fp16(True)
    assert step.path == "queued"
    assert scales == [4096.0, 8192.0, 4096.0, 4096.0, 4096.0, 8192.0, 8192.0]
    assert [result.skipped for result in results] == [i in (2, 4) for i in range(7)]
    assert [(one.where, one.nature, one.scale) for one in step.records] == [
        ("gradient", "calibration", 8192.0),
        ("loss", "collapse", 4096.0),
    ]
    assert results[6].scale == 8192.0
    assert copy.deepcopy(step._loss_scale).value == 8192.0
    monkeypatch.undo()
    expected, expected_scales, expected_state, general = run_in_fp16(False)
    assert general.path == "general"
    assert scales == expected_scales
    assert [one.loss for one in results] == pytest.approx([one.loss for one in expected], nan_ok=True)
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
    step._loss_scale.value = 1024.0
    assert step.scale == 1024.0


def scaled_loop(monkeypatch, queue):
    """A loop with a scaler whose third step has an Inf gradient, the fifth a loss of NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = guard.optim.AdamW(model.parameters(), lr=0.05)
    scaler = guard.GradScaler("cpu", init_scale=4096.0, growth_interval=2, model=model, ceiling=2.0**13)
    if queue:
        monkeypatch.setattr(guard.GradScaler, "_on_cpu", False)
        monkeypatch.setattr(scaler_steps, "why_not", lambda *_: None)
    scales = []
    for i, (x, y) in enumerate([*batches(), *batches()[:3]]):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss * math.nan if i == 4 else loss).backward()
        if i == 2:
            model[0].weight.grad[1, 1] = math.inf
        assert scaler.step(optimizer) is None
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, model.state_dict(), scaler, optimizer


@pytest.mark.usefixtures("on_device")
def test_a_scalers_queued_steps_are_its_own_and_told_when_asked(monkeypatch):
    scales, state, scaler, optimizer = scaled_loop(monkeypatch, True)
    assert scales == [4096.0, 8192.0, 4096.0, 4096.0, 4096.0, 8192.0, 8192.0]
    assert scaler._optimizers[optimizer].queue._queued == 7
    assert [(one.step, one.where, one.culprit) for one in scaler.records] == [
        (2, "gradient", "0.weight"),
        (4, "gradient", "0.weight"),
    ]
    assert scaler.skipped == 2
    assert len(scaler.records) == 2
    monkeypatch.undo()
    expected_scales, expected, general, _ = scaled_loop(monkeypatch, False)
    assert scales == expected_scales
    assert [record.step for record in general.records] == [2, 4]
    assert all(torch.equal(state[name], expected[name]) for name in state)
