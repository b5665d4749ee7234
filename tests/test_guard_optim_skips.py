"""guard.optim: a step is taken whole or not at all; clipping and the loss scale."""

import math

import pytest
import torch
from guarded_update_cases import OPTIMIZERS, assert_same, everything, give_gradients, make, parameters

from mlpkit.guard import optim
from mlpkit.guard.update import DeviceScale
from mlpkit.ops.guarded_update import ScaleRule

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [INF, -INF, NAN])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_bad_gradient_skips_the_whole_step(name, kind, steps):
    ours = parameters()
    optimizer = make(name, ours, clip_norm=1.0)
    for step in range(steps):
        give_gradients(ours, step)
        optimizer.step()
    before = everything(optimizer)
    give_gradients(ours, 7)
    ours[3].grad[4, 1, 0] = kind
    optimizer.step()
    assert_same(before, everything(optimizer))
    (record,) = optimizer.records
    assert (record.step, record.where, record.first_index) == (steps, "gradient", 26)
    assert record.culprit == "group 0, parameter 3 (5, 3, 2)"
    assert record.kind == ("NaN" if math.isnan(kind) else "Inf")
    give_gradients(ours, 8)
    optimizer.step()
    assert len(optimizer.records) == 1
    assert any(not torch.equal(before[i, "p"], p) for i, p in enumerate(ours))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_a_twin_that_never_saw_it(name):
    ours, twins = parameters(), parameters()
    optimizer, twin = make(name, ours), make(name, twins)
    for step in range(6):
        if step in (0, 3):
            give_gradients(ours, 50 + step)
            ours[0].grad[2, 2] = NAN
            optimizer.step()
        give_gradients(ours, step)
        give_gradients(twins, step)
        optimizer.step()
        twin.step()
        assert_same(everything(twin), everything(optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_update_that_would_overflow_skips_the_step(name, dtype):
    ours = parameters(dtype)
    optimizer = make(name, ours)
    give_gradients(ours, 0, 0.1)
    optimizer.step()
    with torch.no_grad():
        ours[5].fill_(torch.finfo(dtype).max)
    optimizer.param_groups[0].update(lr=-1.0 if dtype == torch.float32 else -0.5, weight_decay=1.0)
    give_gradients(ours, 1, 0.1)
    before = everything(optimizer)
    optimizer.step()
    assert_same(before, everything(optimizer))
    assert [(record.where, record.culprit) for record in optimizer.records] == [
        ("update", "group 0, parameter 5 (129,)")
    ]


def test_an_overflow_is_seen_whatever_touched_the_state():
    ours = parameters()
    optimizer = optim.Adam(ours)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    optimizer.state[ours[0]]["exp_avg"].fill_(1e38)
    optimizer.state[ours[0]]["exp_avg_sq"].zero_()
    before = everything(optimizer)
    optimizer.step()
    assert_same(before, everything(optimizer))
    assert optimizer.records[0].where == "update"


def test_huge_gradients_are_clipped():
    ours, twins = parameters(), parameters()
    optimizer, twin = optim.SGD(ours, lr=0.1, clip_norm=1.0), optim.SGD(twins, lr=0.1, clip_norm=1.0)
    give_gradients(ours, 0, 2.0**66)
    give_gradients(twins, 0, 2.0**10)
    optimizer.step()
    twin.step()
    assert optimizer.grad_norm > 1e20
    assert_same(everything(twin), everything(optimizer))
    huge = parameters(torch.float64)
    optimizer = optim.SGD(huge, lr=0.1, clip_norm=1.0)
    before = everything(optimizer)
    give_gradients(huge, 0)
    for p in huge:
        p.grad *= 1e200
    optimizer.step()
    moved = math.sqrt(sum((before[i, "p"] - p).square().sum().item() for i, p in enumerate(huge)))
    assert optimizer.skipped == 0
    assert abs(moved - 0.1) < 1e-12


def test_clipping_is_that_of_one_norm_over_all_groups():
    ours = parameters()
    optimizer = optim.SGD([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.2}], lr=0.1, clip_norm=0.5)
    theirs = parameters()
    stock = torch.optim.SGD([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.2}], lr=0.1)
    give_gradients(ours)
    give_gradients(theirs)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    optimizer.step()
    stock.step()
    assert abs(optimizer.grad_norm - norm.item()) < 1e-4
    for a, b in zip(ours, theirs):
        # torch divides by norm + 1e-6 and rounds the clipped gradient.
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_scale_divides_moves_and_is_checked():
    ours, twins = parameters(), parameters()
    optimizer, twin = optim.AdamW(ours), optim.AdamW(twins)
    scale = DeviceScale(1024.0, ScaleRule(interval=2))
    for step in range(4):
        give_gradients(ours, step, float(scale.value))
        give_gradients(twins, step)
        optimizer.step(scale=scale)
        twin.step()
        assert_same(everything(twin), everything(optimizer))
    assert float(scale.value) == 4096.0
    give_gradients(ours, 9)
    ours[0].grad[0, 0] = INF
    optimizer.step(scale=scale)
    assert (float(scale.value), int(scale.clean_steps)) == (2048.0, 0)
    for wrong in (0.0, -1.0, INF, NAN, 1e-42):
        scale.value.fill_(wrong)
        before = everything(optimizer)
        give_gradients(ours, 10)
        optimizer.step(scale=scale)
        assert_same(before, everything(optimizer))
        assert "reciprocal" in optimizer.records[-1].note
