import math

import numpy as np
import pytest
import torch

import mlpkit
from mlpkit.errors import ArgumentError, DtypeError

# Bits of: sign, exponent field, mantissa field; and the integer type that holds them.
LAYOUTS = {
    torch.float64: (11, 52, np.uint64, torch.int64),
    torch.float32: (8, 23, np.uint32, torch.int32),
    torch.float16: (5, 10, np.uint16, torch.int16),
    torch.bfloat16: (8, 7, np.uint16, torch.int16),
}


def values_of(bits, exponent_bits, mantissa_bits):
    """The numbers behind bit patterns, by the definition of the formats; exact in float64 for every format here."""
    field = (bits >> mantissa_bits).astype(np.int64) & ((1 << exponent_bits) - 1)
    mantissa = (bits & bits.dtype.type((1 << mantissa_bits) - 1)).astype(np.float64)
    bias = (1 << (exponent_bits - 1)) - 1
    negative = (bits >> bits.dtype.type(exponent_bits + mantissa_bits)).astype(bool)
    whole = np.where(field > 0, mantissa + 2.0**mantissa_bits, mantissa)
    top = (1 << exponent_bits) - 1
    magnitude = np.ldexp(whole, np.where(field == top, 0, np.maximum(field, 1) - bias - mantissa_bits))
    magnitude = np.where(field == top, np.where(mantissa > 0, np.nan, np.inf), magnitude)
    return np.where(negative, -magnitude, magnitude), (field == 0) & (mantissa > 0)


def oracle(bits, dtype):
    exponent_bits, mantissa_bits, unsigned, _ = LAYOUTS[dtype]
    values, subnormal = values_of(bits.astype(unsigned), exponent_bits, mantissa_bits)
    finite = np.isfinite(values)
    magnitude = np.abs(values[finite])
    nonzero = magnitude[magnitude > 0]
    bad = np.flatnonzero(~finite)
    histogram = np.bincount(np.clip(np.frexp(nonzero)[1] - 1 + 40, 0, 63), minlength=64)
    return {
        "nan": int(np.isnan(values).sum()),
        "posinf": int((values == np.inf).sum()),
        "neginf": int((values == -np.inf).sum()),
        "zero": int((values == 0).sum()),
        "subnormal": int(subnormal.sum()),
        "above_fp16_max": int((magnitude > 65504).sum()),
        "below_fp16_min": int((nonzero < 2.0**-14).sum()),
        "absmax": float(magnitude.max(initial=0.0)),
        "min_nonzero": float(nonzero.min()) if nonzero.size else 0.0,
        "first_nonfinite": int(bad[0]) if bad.size else -1,
        "histogram": tuple(int(count) for count in histogram),
    }


def tensor_of(bits, dtype):
    _, _, unsigned, signed = LAYOUTS[dtype]
    signed_bits = bits.astype(unsigned).view(np.dtype(unsigned).name.removeprefix("u"))
    return torch.from_numpy(signed_bits.copy()).to(signed).view(dtype)


def assert_exact(bits, dtype, tensor=None):
    found = mlpkit.census(tensor_of(bits, dtype) if tensor is None else tensor, histogram=True)
    for name, value in oracle(bits, dtype).items():
        assert getattr(found, name) == value, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_65536_patterns_are_counted_exactly(dtype, cpu_capability):
    assert_exact(np.arange(65536), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_pattern_alone_is_classified_exactly(dtype):
    tensors = list(tensor_of(np.arange(65536), dtype).split(1))
    counts, extremes, _ = torch.ops.mlpkit.census(tensors)
    exponent_bits, mantissa_bits, unsigned, _ = LAYOUTS[dtype]
    values, subnormal = values_of(np.arange(65536).astype(unsigned), exponent_bits, mantissa_bits)
    kinds = [np.isnan(values), values == np.inf, values == -np.inf, values == 0, subnormal]
    assert np.array_equal(counts[:, :5].numpy(), np.stack(kinds, 1).astype(np.int64))
    magnitude = np.where(np.isfinite(values), np.abs(values), 0.0)
    assert np.array_equal(extremes.numpy(), np.stack([magnitude, magnitude], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 4095, 4096, 65537, 300_001])
def test_random_patterns_are_counted_exactly(dtype, size, cpu_capability):
    rng = np.random.default_rng(size)
    assert_exact(rng.integers(0, 1 << 64, size, dtype=np.uint64) >> np.uint64(64 - 8 * dtype.itemsize), dtype)


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_limits_of_float16_and_of_the_dtype_itself(dtype):
    numbers = [65504.0, -65504.0, 65536.0, 2.0**-14, 2.0**-15, torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.0]
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    signed = LAYOUTS[dtype][3]
    assert_exact(tensor.view(signed).numpy().astype(np.int64), dtype, tensor)


def test_strides_do_not_change_the_counts_and_the_index_is_logical():
    x = torch.arange(24.0).reshape(4, 6)
    x[3, 1] = math.inf
    assert mlpkit.census(x.t()).first_nonfinite == 1 * 4 + 3
    assert mlpkit.census(x[::3, 1::2]).posinf == 1
    assert mlpkit.census(x[:, 2:]).finite
    assert mlpkit.census(torch.tensor(math.nan).expand(3, 2)).nan == 6


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_an_empty_tensor_has_nothing_of_anything(shape):
    found = mlpkit.census(torch.empty(shape), histogram=True)
    assert (found.nan, found.zero, found.absmax, found.min_nonzero, found.first_nonfinite) == (0, 0, 0.0, 0.0, -1)
    assert sum(found.histogram) == 0
    assert found.shape == shape


def test_threads_do_not_change_the_result():
    x = torch.randn(500_000)
    x[400_000] = math.nan
    one = mlpkit.census(x, histogram=True)
    torch.set_num_threads(2)
    assert mlpkit.census(x, histogram=True) == one
    assert one.first_nonfinite == 400_000


def test_it_prints_one_line_with_the_headroom_in_bits():
    x = torch.tensor([[0.0, 1.0], [-8192.0, math.nan]], dtype=torch.float16)
    assert str(mlpkit.census(x)) == (
        "2x2 float16: |x| 1 to 8.19e+03, NaN 1, Inf 0, -Inf 0, zero 1, subnormal 0, headroom 3.0 bits"
    )


def test_a_tensor_that_requires_grad_is_counted_without_a_graph():
    assert mlpkit.census(torch.ones(3, requires_grad=True)).absmax == 1.0


def test_what_is_no_dense_floating_tensor_is_refused_by_name():
    with pytest.raises(DtypeError, match="int64, must be float64"):
        mlpkit.census(torch.arange(3))
    with pytest.raises(ArgumentError, match="a list, must be a dense tensor"):
        mlpkit.census([1.0])
    with pytest.raises(ArgumentError, match="sparse_coo tensor, must be a dense tensor"):
        mlpkit.census(torch.eye(2).to_sparse())


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_the_operator_is_lawful(dtype):
    arguments = ([torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)], True)
    torch.library.opcheck(torch.ops.mlpkit.census, arguments)
