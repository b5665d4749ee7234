"""Guarded updates at the edges of their numbers, and of what other libraries hand them."""

import math

import pytest
import torch
from torch import nn

from mlpkit.errors import ArgumentError
from mlpkit.guard import optim


def parameter(*size, value=1.0, dtype=torch.float32, gradient=1.0):
    p = nn.Parameter(torch.full(size, value, dtype=dtype))
    p.grad = torch.full(size, gradient, dtype=dtype)
    return p


@pytest.mark.parametrize("place", [0, 40000, 69999])
def test_a_negative_second_moment_is_found_in_any_chunk(place):
    p = parameter(70000)
    optimizer = optim.Adam([p])
    optimizer.step()
    with torch.no_grad():
        optimizer.state[p]["exp_avg_sq"][place] = -1
    before = p.detach().clone()
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(p, before)


def test_a_float64_step_to_infinity_is_none():
    p = parameter(3, dtype=torch.float64, gradient=1e300)
    optimizer = optim.SGD([p], lr=1e300)
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(p, torch.ones(3, dtype=torch.float64))


def test_lamb_without_a_norm_moves_by_lr_and_no_further():
    p = parameter(3, value=0.0, dtype=torch.float16)
    optimizer = optim.LAMB([p], lr=1e5)
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(p, torch.zeros(3, dtype=torch.float16))
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert optimizer.skipped == 1
    assert p.isfinite().all()
    assert (p < 0).all()


def test_subnormal_gradients_of_float64_are_taken():
    p = parameter(3, value=0.0, dtype=torch.float64, gradient=1e-310)
    optim.SGD([p], lr=1.0).step()
    assert torch.equal(p, torch.full((3,), -1e-310, dtype=torch.float64))


def test_torchs_scaler_without_gradients_takes_no_step():
    p = parameter(3)
    optimizer = optim.Adam([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    before = p.detach().clone()
    optimizer.zero_grad()
    scaler.scale(p.sum())
    scaler.step(optimizer)
    assert torch.equal(p, before)


@pytest.mark.parametrize("scale", [1024.0, 1024])
def test_a_scale_may_be_a_number(scale):
    p = parameter(3, gradient=1024.0)
    optimizer = optim.SGD([p], lr=1.0)
    optimizer.grad_scale = scale
    optimizer.step()
    assert torch.equal(p, torch.zeros(3))


def test_a_scale_of_another_dtype_is_named_and_nothing_stays():
    p = parameter(3)
    optimizer = optim.SGD([p], lr=1.0, momentum=0.9, dampening=0.5)
    optimizer.grad_scale = torch.tensor(1.0, dtype=torch.float16)
    with pytest.raises(ValueError, match="scale is Half"):
        optimizer.step()
    assert not optimizer.state
    optimizer.grad_scale = None
    optimizer.step()
    assert torch.equal(p, torch.zeros(3))


def test_a_step_count_that_is_a_number_is_read():
    p = parameter(3)
    optimizer = optim.LAMB([p])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 1
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2


def test_state_that_is_no_tensor_is_named():
    p = parameter(3)
    optimizer = optim.Adam([p])
    optimizer.step()
    optimizer.state[p]["exp_avg"] = [0.0, 0.0, 0.0]
    with pytest.raises(TypeError, match="exp_avg"):
        optimizer.step()


def test_adam_refuses_a_group_of_adamw():
    p = parameter(1)
    with pytest.raises(ArgumentError, match="decoupled_weight_decay"):
        optim.Adam([{"params": [p], "decoupled_weight_decay": True}], lr=0.1, weight_decay=0.1).step()
    assert math.isclose(p.item(), 1.0)


def test_strides_of_single_columns_say_nothing():
    p = nn.Parameter(torch.ones(4, 3, 1, 1).to(memory_format=torch.channels_last))
    p.grad = torch.ones(4, 3, 1, 1)
    optimizer, twin = optim.Adam([p]), nn.Parameter(p.detach().clone())
    optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].as_strided((4, 3, 1, 1), (3, 1, 1, 1))
    optimizer.step()
    other = torch.optim.Adam([twin])
    for _ in range(2):
        twin.grad = torch.ones(4, 3, 1, 1)
        other.step()
    torch.testing.assert_close(p, twin)
