"""linear_act_dropout_forward_watched: the largest magnitude that the epilogue reports is that of what it wrote."""

import math

import pytest
import torch
from linear_act_dropout_cases import DTYPES

from mlpkit.ops.linear_act_dropout import ACTIVATIONS

watched = torch.ops.mlpkit.linear_act_dropout_forward_watched
plain = torch.ops.mlpkit.linear_act_dropout_forward
SEED = torch.tensor([7, 0])
# rows, cols: one block, ragged in both directions, and blocks beside and below each other.
SHAPES = [(16, 16), (37, 21), (300, 530)]


def arguments(rows, cols, dtype, activation, p=0.3):
    generator = torch.Generator().manual_seed(rows + cols)
    x, weight = (torch.randn(n, 5, generator=generator).to(dtype) for n in (rows, cols))
    slope = torch.full((1,), 0.25, dtype=dtype) if activation == "prelu" else None
    return [x, weight, None, slope, SEED, activation, 0.25, p, 3, True]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_largest_magnitude_of_y_and_changes_no_bit(activation, dtype, shape, cpu_capability):
    given = arguments(*shape, dtype, activation)
    y, z, bits, absmax = watched(*given)
    plain_y, plain_z, plain_bits = plain(*given)
    assert torch.equal(y, plain_y)
    assert torch.equal(z, plain_z)
    assert bits.shape == plain_bits.shape
    assert absmax.dtype == torch.float64
    assert absmax.shape == ()
    assert absmax.item() == y.double().abs().max().item() > 0


@pytest.mark.parametrize("place", [(0, 0), (36, 20), (299, 529)], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_number_that_is_not_finite_shows(dtype, value, place, cpu_capability):
    row, col = place
    given = arguments(row + 1, col + 1, dtype, "identity", p=0.0)
    given[0].zero_()
    given[1].zero_()
    given[0][row, 0] = value
    given[1][col, 0] = 1.0
    given[1][:col, 0] = 1e-3
    y, _, _, absmax = watched(*given)
    assert not y.isfinite().all()
    assert math.isnan(absmax.item()) if math.isnan(value) else absmax.item() == math.inf


@pytest.mark.parametrize("cols", [1, 40])
def test_nan_counts_beside_inf(cols, cpu_capability):
    given = arguments(40, cols, torch.float32, "identity", p=0.0)
    given[0][:] = 1.0
    given[0][3], given[0][5] = math.inf, math.nan
    given[1][:] = 1.0
    assert math.isnan(watched(*given)[3].item())


def test_a_finite_sum_that_rounds_to_inf_shows_as_inf(cpu_capability):
    x, weight = torch.full((3, 2), 40000.0, dtype=torch.float16), torch.ones(2, 2, dtype=torch.float16)
    assert watched(x, weight, None, None, None, "identity", 0.0, 0.0, 0, False)[3].item() == math.inf


def test_nothing_written_is_zero():
    x, weight = torch.ones(0, 2), torch.ones(3, 2)
    assert watched(x, weight, None, None, None, "relu", 0.0, 0.0, 0, False)[3].item() == 0.0
