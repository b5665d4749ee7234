"""Unscaling by one native call: torch's bits, and a census of the gradients as they came."""

import math

import pytest
import torch
from torch import nn

from mlpkit._ext import _C
from mlpkit.guard import GradScaler, optim

SHAPES = ((7, 129), (129,), (1, 7), (), (0, 3), (70_001,))


def gradients(dtype, special=None):
    generator = torch.Generator().manual_seed(0)
    found = [(torch.randn(shape, generator=generator) * 1e3).to(dtype) for shape in SHAPES]
    found[0][3, 5] = 1e-41  # below the normal numbers
    if special is not None:
        found[-1][-1] = special
    return found


def groups_of(tensors):
    parameters = [nn.Parameter(torch.zeros_like(one)) for one in tensors]
    for parameter, gradient in zip(parameters, tensors):
        parameter.grad = gradient.clone()
    return [{"params": parameters[:2]}, {"params": parameters[2:]}], parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 3.0, 2.0**-100, 1e-38])
@pytest.mark.parametrize("special", [None, math.inf, -math.inf, math.nan])
def test_gradients_and_flag_are_torchs_bit_for_bit(dtype, scale, special):
    given = gradients(dtype, special)
    groups, parameters = groups_of(given)
    number, flag = torch.tensor(scale), torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(given, flag, number.double().reciprocal().float())
    found, absmax, largest = _C.unscale(groups, number)
    assert found.dtype == torch.float32
    assert torch.equal(found, flag)
    for parameter, expected in zip(parameters, given):
        assert torch.equal(parameter.grad.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))
    expected = [
        one.abs().nan_to_num(nan=math.inf, posinf=math.inf).amax().item() if one.numel() else 0.0
        for one in gradients(dtype, special)
    ]
    assert absmax.tolist() == expected
    assert largest == max(expected)


def test_absent_gradients_are_nan_and_float16_complex_and_sparse_ones_are_left_to_torch():
    groups, parameters = groups_of(gradients(torch.float32))
    parameters[1].grad = None
    absmax = _C.unscale(groups, torch.tensor(2.0))[1]
    assert math.isnan(absmax[1])
    assert math.isfinite(absmax[0])
    for parameter in parameters:
        parameter.grad = None
    assert _C.unscale(groups, torch.tensor(2.0)) is None
    for kind in (torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()):
        parameter = nn.Parameter(torch.zeros(2, dtype=kind.dtype))
        parameter.grad = kind
        assert _C.unscale([{"params": [parameter]}], torch.tensor(2.0)) is None
        assert torch.equal(parameter.grad.to_dense(), torch.ones(2, dtype=kind.dtype))


def test_overlapping_gradients_are_left_to_torch():
    parameter = nn.Parameter(torch.zeros(4, 3))
    parameter.grad = torch.ones(3).expand(4, 3)
    assert _C.unscale([{"params": [parameter]}], torch.tensor(2.0)) is None


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, optim.Adam])
@pytest.mark.parametrize("bad", [False, True])
def test_after_a_step_gradients_are_unscaled_as_torchs_scaler_leaves_them(kind, bad):
    parameters = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))]
    optimizer, scaler = kind(parameters, lr=0.1), GradScaler("cpu", init_scale=8.0)
    scaler._warned = True
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 4.0)
        if bad:
            parameters[1].grad[0] = math.inf
        scaler.scale(torch.ones(()))
        assert scaler.step(optimizer) is None
        assert torch.equal(parameters[0].grad, torch.full((5,), 4.0 / scaler.get_scale()))
        assert set(scaler._found_inf_per_device(optimizer)) == {torch.device("cpu")}
        scaler.update()
    assert scaler.skipped == (3 if bad else 0)
    assert (scaler.get_scale() < 8) == bad


def test_a_rate_that_went_bad_is_an_error_and_gradients_stay_scaled():
    parameter = nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.Adam([parameter]), GradScaler("cpu", init_scale=8.0)
    scaler._warned = True
    for rate in (1e-3, 1e-3, math.nan):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.full_like(parameter, 4.0)
        scaler.scale(torch.ones(()))
        if math.isfinite(rate):
            scaler.step(optimizer)
            scaler.update()
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match="lr of parameter group 0 is nan"):
        scaler.step(optimizer)
    assert torch.equal(parameter, before)
    assert torch.equal(parameter.grad, torch.full((3,), 4.0))
