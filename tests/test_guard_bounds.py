"""The proof behind updates without a copy: finite at the edge of the bound, not vouched for beyond it."""

import itertools
import math

import pytest
import torch

from mlpkit.guard import bounds
from mlpkit.guard.census import Readings

EDGE = bounds.LARGEST
ADAM = {"eps": 2.0**-40, "lr": 2.0**10, "weight_decay": 2.0**10}
CASES = [
    (torch.optim.SGD, {"lr": 2.0**10, "weight_decay": 2.0**10, "momentum": 2.0**10, "dampening": -(2.0**10)}),
    (torch.optim.SGD, {"lr": 2.0**10, "weight_decay": 2.0**10, "momentum": 2.0**10, "nesterov": True}),
    *(
        (torch.optim.Adam, {**ADAM, "betas": (b, c), "amsgrad": amsgrad})
        for b, c, amsgrad in itertools.product((0.0, 1 - 2.0**-20), (0.0, 1 - 2.0**-20), (False, True))
    ),
    (torch.optim.AdamW, {**ADAM, "betas": (1 - 2.0**-20, 0.0)}),
    *((torch.optim.RMSprop, {**ADAM, "alpha": alpha, "momentum": 2.0**10}) for alpha in (0.0, 1 - 2.0**-20)),
]


def at_the_edge(kind, options, dtype, moment, count, sign):
    parameter = torch.nn.Parameter(torch.tensor([sign * EDGE], dtype=dtype))
    optimizer = kind([parameter], **options)
    parameter.grad = torch.tensor([EDGE], dtype=dtype)
    optimizer.step()  # makes the state, which the edge then replaces
    with torch.no_grad():
        parameter.fill_(sign * EDGE)
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                low = key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
                value.fill_(count if key == "step" else moment if low else EDGE)
    parameter.grad = torch.tensor([EDGE], dtype=dtype)
    return parameter, optimizer


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_edge_of_the_bound_an_update_is_finite(kind, options, dtype):
    for moment, count, sign, gradient in itertools.product((0.0, EDGE), (0.0, 1e6), (1, -1), (0.0, EDGE)):
        parameter, optimizer = at_the_edge(kind, options, dtype, moment, count, sign)
        parameter.grad.fill_(gradient)
        assert bounds.provable(optimizer)
        readings = Readings()
        bounds.add_readings(readings, optimizer)
        assert not readings.exceeded()
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        assert all(bool(torch.isfinite(value).all()) for value in (parameter, *state))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("exp_avg", value) for value in (2 * EDGE, math.nan, -math.inf)),
        *(("exp_avg_sq", value) for value in (2 * EDGE, -1e-30, math.nan)),
        *(("step", value) for value in (-1.0, math.nan)),
    ],
)
def test_state_beyond_the_bound_shows_in_the_readings(key, value):
    parameter, optimizer = at_the_edge(torch.optim.Adam, ADAM, torch.float32, 1.0, 1.0, 1)
    optimizer.state[parameter][key].fill_(value)
    readings = Readings()
    bounds.add_readings(readings, optimizer)
    assert readings.exceeded()


@pytest.mark.parametrize("value", [2 * EDGE, math.nan, math.inf])
def test_parameters_beyond_the_bound_show_in_the_readings(value):
    readings = Readings()
    bounds.add_readings(readings, torch.optim.SGD([torch.nn.Parameter(torch.tensor([1.0, value]))]))
    assert readings.exceeded()


class Own(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Own, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.RMSprop, {"eps": 0.0}),
        (torch.optim.Adam, {"eps": 1e-20}),
        (torch.optim.Adam, {"lr": 1e4}),
        (torch.optim.Adam, {"betas": (0.9, 1 - 1e-9)}),
        (torch.optim.SGD, {"weight_decay": 1e4}),
    ],
)
def test_other_formulas_and_settings_are_not_vouched_for(kind, options):
    assert not bounds.provable(kind([torch.nn.Parameter(torch.ones(1))], **options))


def test_neither_are_half_precision_parameters_and_hooked_optimizers():
    assert not bounds.provable(torch.optim.SGD([torch.nn.Parameter(torch.ones(1).half())]))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    assert bounds.provable(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    assert not bounds.provable(optimizer)
