"""The precision rule can fail: planted faults are caught, and what only rounds is not."""

import pytest
import torch
from closeness import SEEDS, assert_no_worse_than

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stock_and_exact(dtype, rows=96, inner=512, cols=64):
    """One product per seed in that dtype by stock PyTorch and in fp64 from the same rounded data."""
    stock, exact, data = [], [], []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(size, inner, generator=generator).to(dtype) for size in (rows, cols))
        data.append((x, w))
        stock.append(x @ w.T)
        exact.append(x.double() @ w.double().T)
    return data, stock, exact


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_correctly_rounded_result_passes(dtype):
    _, stock, exact = stock_and_exact(dtype, inner=8)
    assert_no_worse_than([c.to(dtype) for c in exact], stock, exact)
    # Even against a stock that happens to be exact in fp64's eyes.
    assert_no_worse_than([c.to(dtype) for c in exact], [c.to(dtype) for c in exact], exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_kept_in_the_low_dtype_are_caught(dtype):
    narrow = {torch.float32: torch.bfloat16}.get(dtype, dtype)
    data, stock, exact = stock_and_exact(dtype)
    ours = []
    for x, w in data:
        total = torch.zeros(x.shape[0], w.shape[0], dtype=narrow)
        for k in range(0, x.shape[1], 16):
            total = (total.float() + x[:, k : k + 16].float() @ w[:, k : k + 16].float().T).to(narrow)
        ours.append(total.to(dtype))
    with pytest.raises(AssertionError, match=r"median RMS error .* above .* stock's .* worst in seed"):
        assert_no_worse_than(ours, stock, exact, "y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_bias_gradient_is_caught(dtype):
    stock, exact, short = [], [], []
    for seed in SEEDS:
        dy = torch.randn(129, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        stock.append(dy.sum(0))
        exact.append(dy.double().sum(0))
        short.append(dy[:-1].sum(0))
    with pytest.raises(AssertionError, match="bias gradient"):
        assert_no_worse_than([torch.zeros_like(b) for b in stock], stock, exact, "bias gradient")
    # One row of 129 forgotten, as at a ragged edge.
    with pytest.raises(AssertionError, match="bias gradient"):
        assert_no_worse_than(short, stock, exact, "bias gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_is_caught_by_the_maximum(dtype):
    _, stock, exact = stock_and_exact(dtype, inner=8)
    ours = [b.clone() for b in stock]
    for result, b, c in zip(ours, stock, exact, strict=True):
        result[3, 5] += 6 * (b - c).abs().max()
    with pytest.raises(AssertionError, match=r"maximum error .* at \(3, 5\)"):
        assert_no_worse_than(ours, stock, exact)


def test_a_mask_of_its_own_is_caught():
    _, stock, exact = stock_and_exact(torch.bfloat16, inner=8)
    ours = [b.clone() for b in stock]
    for result in ours:
        result[::7, ::5] = 0
    with pytest.raises(AssertionError, match="RMS error"):
        assert_no_worse_than(ours, stock, exact)


def test_nan_and_inf_never_pass():
    _, stock, exact = stock_and_exact(torch.float32, inner=8)
    for planted in (float("nan"), float("inf")):
        ours = [b.clone() for b in stock]
        for result in ours:
            result[0, 0] = planted
        with pytest.raises(AssertionError, match="RMS error"):
            assert_no_worse_than(ours, stock, exact)


def test_the_rule_refuses_what_it_cannot_compare():
    _, stock, exact = stock_and_exact(torch.float16, inner=8)
    with pytest.raises(AssertionError, match="wants 9 seeds"):
        assert_no_worse_than(stock[:1], stock[:1], exact[:1])
    with pytest.raises(AssertionError, match=r"ours is torch\.float32"):
        assert_no_worse_than([b.float() for b in stock], stock, exact)
    with pytest.raises(AssertionError, match="wants float64"):
        assert_no_worse_than(stock, stock, [c.float() for c in exact])
    with pytest.raises(AssertionError, match="differ"):
        assert_no_worse_than([b[:1] for b in stock], stock, exact)
