"""guard.GradScaler: policies, errors, records, history and the native step."""

import copy
import math

import pytest
import torch
from closeness import assert_within_ulps
from guard_loop import STOCK, Loop
from guard_runs import assert_same_bits
from torch import nn

from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.guard import GradScaler, History, headroom, optim
from mlpkit.guard.attempt import Attempt
from mlpkit.guard.state import OptimizerCopy
from mlpkit.trace import Tracer


def test_policies_of_the_scaler_act_in_update():
    loop = Loop(on_nonfinite="raise")
    with pytest.raises(NonFiniteError, match=r"gradient of 3\.bias holds 3 NaN") as caught:
        loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    assert caught.value.records == loop.scaler.records
    loop.take()
    loop = Loop(on_collapse="raise")
    loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    x, y = loop.batch()
    with pytest.raises(NonFiniteError, match="The forward itself held it"):
        loop.take(x * 3e5, y)
    loop = Loop(max_consecutive_skips=2)
    loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"2 steps in a row were skipped \(max_consecutive_skips=2\)"):
        loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))


def test_bad_state_and_settings_are_errors_that_name_them():
    loop = Loop()
    loop.take()
    loop.optimizer.param_groups[0]["lr"] = torch.nan
    before = loop.state()
    with pytest.raises(ArgumentError, match="GradScaler: lr of parameter group 0 is nan"):
        loop.take()
    assert_same_bits(loop.model[3].state_dict(), copy.deepcopy(loop.model[3]).state_dict())
    loop.optimizer.param_groups[0]["lr"] = 0.01
    loop = Loop()
    loop.take()
    loop.optimizer.state[loop.model[3].bias]["exp_avg"][1] = torch.nan
    before = loop.state()
    with pytest.raises(NonFiniteError, match=r"optimizer state 'exp_avg of 3\.bias' held 1 NaN before the step"):
        loop.take()
    assert_same_bits(loop.state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "init_scale is 0.0"),
        ({"init_scale": torch.nan}, "init_scale is nan"),
        ({"init_scale": 1e-40}, "init_scale is 1e-40; it and its reciprocal"),
        ({"growth_factor": torch.nan}, "growth_factor is nan"),
        ({"backoff_factor": 0.0}, "backoff_factor is 0.0"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"floor": -1.0}, "floor is -1.0"),
        ({"ceiling": torch.inf}, "ceiling is inf"),
        ({"floor": 8.0, "ceiling": 4.0}, r"floor is 8\.0; it must be at most the ceiling, 4\.0"),
        ({"model": 3}, "model is int"),
        ({"device": 1024.0}, "device is 1024.0"),
        ({"on_nonfinite": "rollback"}, "'rollback' is TrainStep's"),
        ({"on_collapse": "fp32_step"}, "'fp32_step' is TrainStep's"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips is 0"),
        ({"check_every": 0}, "check_every is 0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(options, message):
    with pytest.raises(ArgumentError, match=message):
        GradScaler(**{"device": "cpu", **options})


def test_history_headroom_and_the_tracers_word_on_where_it_began():
    history = History()
    loop = Loop(history=history, init_scale=1024.0)
    loop.take()
    largest = max(float(p.grad.abs().max()) for p in loop.model.parameters()) * 1024.0
    bits = min(loop.scaler.headroom.values())
    assert bits == pytest.approx(float(torch.tensor(65504.0 / largest).log2()), abs=1e-3)
    with Tracer(loop.model):
        loop.take()
        x, y = loop.batch()
        loop.take(x * 3e5, y)
    record = loop.scaler.records[0]
    assert (record.module, record.op, record.cause) == ("0", "_to_copy", "cast_overflow")
    rows = history.rows()
    assert [row["skipped"] for row in rows] == [False, False, True]
    assert rows[0]["headroom"] == bits
    assert rows[0]["grad_norm"] > 0


def test_gradients_that_no_kernel_counts_may_be_empty_or_lie_on_several_devices(monkeypatch):
    monkeypatch.setattr(headroom, "_COUNTED", ())  # as on a device
    gradients = [torch.tensor([1.0, -3.0]), torch.zeros(0), torch.tensor([torch.inf]), torch.tensor([torch.nan])]
    assert headroom.absmax(gradients).tolist() == [3.0, 0.0, torch.inf, torch.inf]
    left_out = headroom.absmax([None, torch.zeros(0, 3)])
    assert math.isnan(left_out[0])
    assert left_out[1] == 0
    assert headroom.absmax([torch.ones(2, device="meta"), torch.ones(2)]).device.type == "meta"
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    attempt = Attempt(optimizer, optimizer.step, {}, OptimizerCopy(optimizer))
    attempt._norms = [torch.ones(2, device="meta"), torch.ones(2)]
    assert attempt.norm.device.type == "meta"


def test_the_scale_that_is_told_without_reading_is_the_scale(monkeypatch):
    # As on a device, where the scale is read only when it may have moved.
    monkeypatch.setattr(GradScaler, "_on_cpu", False)
    loop = Loop(growth_interval=3, init_scale=256.0)
    nan, none = (lambda loop: loop.model[3].bias.grad.fill_(torch.nan)), None
    for index, spoil in enumerate([none, none, nan, none, none, none, none, none, none, none]):
        if index == 5:
            x, y = loop.batch()
            loop.take(x * torch.nan, y)  # holds the scale and its tracker
        loop.take(spoil=spoil)
        assert loop.scaler._known == float(loop.scaler._scale)
        assert loop.scaler._clean_steps == int(loop.scaler._growth_tracker)
    assert [change.after for change in loop.scaler.scale_changes] == [128.0, 256.0, 512.0]
    loop.scaler.load_state_dict(loop.scaler.state_dict())
    loop.take()
    assert loop.scaler._known == float(loop.scaler._scale)


def test_our_own_optimizers_are_updated_by_one_native_call_and_guarded_as_any_other():
    loop, stock = Loop(clip=None), Loop(STOCK)
    loop.optimizer = optim.Adam(loop.model.parameters(), lr=0.01)
    stock.optimizer = torch.optim.Adam(stock.model.parameters(), lr=0.01, fused=True)
    for _ in range(4):
        before = copy.deepcopy(stock.model.state_dict())
        loop.take()
        stock.take()
        for name, parameter in loop.model.named_parameters():
            assert_within_ulps(parameter.detach(), stock.model.state_dict()[name], before[name], name, ulps=8)
    assert loop.scaler._optimizers[loop.optimizer].fused.prepared
    before = loop.state()
    loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.inf))
    loop.take(spoil=lambda loop: loop.model[3].weight.grad.fill_(1e27))
    x, y = loop.batch()
    loop.take(x * torch.nan, y)
    assert_same_bits(loop.state(), before)
    assert [(record.where, record.culprit) for record in loop.scaler.records] == [
        ("gradient", "3.bias"),
        ("update", "exp_avg_sq of 3.weight"),
        ("inputs", "inputs"),
    ]
    loop.take()
    assert len(loop.scaler.records) == 3
