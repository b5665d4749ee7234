"""linear_act_dropout on NaN, Inf and signed zeros: what IEEE arithmetic and stock PyTorch say, never hidden."""

import math

import pytest
import torch
from linear_act_dropout_cases import DTYPES

from mlpkit.functional import linear_act_dropout
from mlpkit.reference import ACTIVATIONS, activate, dropout_mask
from mlpkit.reference import linear_act_dropout as stock

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0]
SEED, P = 4, 0.5


def extras(activation, dtype):
    if activation == "prelu":
        return {"slope": torch.full((1,), 0.25, dtype=dtype)}
    return {"slope": 0.25} if activation == "leaky_relu" else {}


def classes(t):
    """NaN, +Inf, -Inf, zero or other, elementwise."""
    return torch.where(t.isnan(), 1, 0) + 2 * t.isposinf() + 3 * t.isneginf() + 4 * (t == 0)


def special_rows(dtype):
    """x and weight whose z is 40 rows of each special value in 33 columns, without any sum of them."""
    return torch.tensor(SPECIAL, dtype=dtype).repeat(40).unsqueeze(1), torch.ones(33, 1, dtype=dtype)


@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_come_out_as_in_stock_pytorch(activation, dtype, p, cpu_capability):
    x, weight = special_rows(dtype)
    arguments = {"activation": activation, "p": p, "seed": SEED, **extras(activation, dtype)}
    ours = linear_act_dropout(x, weight, **arguments)
    # In fp64: PyTorch's vectorised fp32 gelu makes NaN of +Inf, its fp64 one does not.
    theirs = stock(x.double(), weight.double(), **(arguments | extras(activation, torch.float64)))
    wrong = classes(ours) != classes(theirs)
    assert not wrong.any(), f"z {x.expand_as(ours)[wrong][:4]}: ours {ours[wrong][:4]}, stock {theirs[wrong][:4]}"


@pytest.mark.cuda
@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_cuda_special_values_come_out_as_on_the_cpu(activation, dtype, p):
    results = []
    for device in ("cpu", "cuda"):
        x, weight = (t.to(device) for t in special_rows(dtype))
        bias = torch.zeros(33, dtype=dtype, device=device, requires_grad=True)
        slope = extras(activation, dtype)
        if activation == "prelu":
            slope["slope"] = slope["slope"].to(device)
        y = linear_act_dropout(x, weight, bias, activation=activation, p=p, seed=SEED, **slope)
        (dz,) = torch.autograd.grad(y[:7].sum(0), bias, torch.ones_like(bias))
        results.append([classes(y.detach().cpu()), classes(dz.cpu())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_at_special_values_are_those_of_stock_pytorch(activation, dtype, p, cpu_capability):
    """dz = dy (m act'(z)) with dy = 1, read off the gradient of the bias over a single row."""
    x, weight = special_rows(dtype)
    for row in range(len(SPECIAL)):
        results = []
        for function in (linear_act_dropout, stock):
            bias = torch.zeros(33, dtype=dtype, requires_grad=True)
            y = function(
                x[row : row + 1], weight, bias, activation=activation, p=p, seed=SEED, **extras(activation, dtype)
            )
            y.backward(torch.ones_like(y))
            results.append(bias.grad)
        ours, theirs = results
        assert torch.equal(classes(ours), classes(theirs)), f"act'({SPECIAL[row]}): ours {ours}, stock {theirs}"


@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_special_dy_is_multiplied_and_never_skipped(activation, dtype, p, cpu_capability):
    """dz = dy (m act'(z)): Inf times a dropped or dead 0 is NaN, NaN stays NaN."""
    rows, cols = 21, 33
    x = torch.linspace(-2, 2, rows).to(dtype).unsqueeze(1)
    weight = torch.ones(cols, 1, dtype=dtype)
    keep, scale = dropout_mask(rows, cols, p, SEED)
    z = x.repeat(1, cols).requires_grad_()
    (slope,) = torch.autograd.grad(activate(z, activation, **extras(activation, dtype)).sum(), z)
    for planted in (math.nan, math.inf, -math.inf):
        batch = torch.zeros(rows, cols, dtype=dtype)
        for row in range(rows):
            bias = torch.zeros(cols, dtype=dtype, requires_grad=True)
            y = linear_act_dropout(x, weight, bias, activation=activation, p=p, seed=SEED, **extras(activation, dtype))
            batch.zero_()[row] = planted
            y.backward(batch)
            assert torch.equal(classes(bias.grad), classes(planted * (keep[row] * scale * slope[row])))


def test_relus_slope_is_0_at_0_and_1_at_nan():
    bias = torch.tensor([0.0, -0.0, math.nan, 1.0], requires_grad=True)
    linear_act_dropout(torch.zeros(1, 1), torch.zeros(4, 1), bias).sum().backward()
    assert bias.grad.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_in_one_row_touch_no_other(dtype, cpu_capability):
    x, weight = torch.ones(40, 70, dtype=dtype), torch.ones(33, 70, dtype=dtype)
    x[17, 3], x[21, 69] = math.inf, math.nan
    y = linear_act_dropout(x, weight, activation="identity")
    assert y[17].isposinf().all()
    assert y[21].isnan().all()
    others = torch.ones(40, dtype=torch.bool)
    others[[17, 21]] = False
    assert (y[others] == 70).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_overflow_of_the_output_dtype_is_inf(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest], [-largest]], dtype=dtype)
    y = linear_act_dropout(x, torch.full((1, 1), 2.0, dtype=dtype), activation="identity")
    assert y.flatten().tolist() == [math.inf, -math.inf]


def test_an_intermediate_beyond_fp16_is_no_overflow():
    """z = 80000 fits fp32 but not fp16; tanh(z) and z / 8 do: only what is written is rounded."""
    x, weight = torch.full((1, 2), 200.0, dtype=torch.float16), torch.full((1, 2), 200.0, dtype=torch.float16)
    assert linear_act_dropout(x, weight, activation="tanh").item() == 1.0
    slope = torch.full((1,), -0.125, dtype=torch.float16)
    assert linear_act_dropout(-x, weight, activation="prelu", slope=slope).item() == 10000.0


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid", "tanh"])
def test_the_slope_beyond_fp16_is_that_of_the_true_preactivation(activation, cpu_capability):
    """y(-80000) = 0 and act'(-80000) = 0: a pre-activation saved for backward as -Inf would make NaN of it."""
    x = torch.full((1, 2), -200.0, dtype=torch.float16)
    weight = torch.full((1, 2), 200.0, dtype=torch.float16, requires_grad=True)
    y = linear_act_dropout(x, weight, activation=activation)
    y.backward(torch.ones_like(y))
    assert y.item() == {"tanh": -1.0}.get(activation, 0.0)
    assert weight.grad.tolist() == [[0.0, 0.0]]
