"""The precision rule of docs/precision.md. The only tolerances of the test suite live here.

Against an fp64 result from the same data and the same dropout mask, over nine seeds: the median RMS error is at most
1.25 times, and the median maximum error at most twice, the error of stock PyTorch in that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

SEEDS = range(9)
RMS_FACTOR = 1.25
MAX_FACTOR = 2.0
# Below its floor an error is no error: stock PyTorch is exact now and then (a sum of one term), we need not be luckier.
MAX_FLOOR_ULPS = 2.0
# A correctly rounded result errs by up to 1/2 ulp and 0.3 ulp RMS. The RMS of many elements is a firm number; of few it
# is a draw of the dice: there the RMS is taken over all nine seeds, and the limits of the maximum hold for it too.
RMS_FLOOR_ULPS = 0.5
MANY_ELEMENTS = 256


def assert_no_worse_than(
    ours: Sequence[Tensor],
    stock: Sequence[Tensor],
    exact: Sequence[Tensor],
    name: str = "result",
    independent: int | None = None,
) -> None:
    """Raises AssertionError when ``ours`` errs more against ``exact`` than ``stock`` does; each has one tensor a seed.

    ours and stock: of one dtype, exact: float64; shapes agree. independent: how many numbers the result is made of,
    where these are fewer than its elements (a matrix of rank one). Message: medians, limits and the worst element.
    """
    assert len(ours) == len(stock) == len(exact) == len(SEEDS), f"{name}: the rule wants {len(SEEDS)} seeds"
    for a, b, c in zip(ours, stock, exact, strict=True):
        assert a.dtype == b.dtype, f"{name}: ours is {a.dtype}, stock is {b.dtype}"
        assert c.dtype == torch.float64, f"{name}: exact is {c.dtype}, the rule wants float64"
        assert a.shape == b.shape == c.shape, f"{name}: shapes {a.shape}, {b.shape}, {c.shape} differ"
    if exact[0].numel() == 0:
        return
    dtype = ours[0].dtype
    magnitudes = [c.abs().max().item() for c in exact]
    if min(exact[0].numel(), independent or exact[0].numel()) < MANY_ELEMENTS:
        limits = (MAX_FACTOR, MAX_FLOOR_ULPS * _ulp(dtype, max(magnitudes)))
        _compare(name, "maximum", _largest, *limits, ours, stock, exact)
        _compare(name, "RMS", _rms, *limits, *([torch.stack(list(runs))] for runs in (ours, stock, exact)))
        return
    max_limits = (MAX_FACTOR, MAX_FLOOR_ULPS * _ulp(dtype, median(magnitudes)))
    rms_limits = (RMS_FACTOR, RMS_FLOOR_ULPS * _ulp(dtype, median(map(_rms, exact))))
    # What is exact for fp64 has exact sums, but activations of stock's own precision.
    _compare(name, "RMS", _rms, *(max_limits if dtype == torch.float64 else rms_limits), ours, stock, exact)
    _compare(name, "maximum", _largest, *max_limits, ours, stock, exact)


def _compare(name, kind, measure, factor, floor, ours, stock, exact) -> None:
    our_error = median(measure(a.double() - c) for a, c in zip(ours, exact, strict=True))
    stock_error = median(measure(b.double() - c) for b, c in zip(stock, exact, strict=True))
    limit = max(factor * stock_error, floor)
    # Written so that NaN fails.
    if our_error <= limit:
        return
    raise AssertionError(
        f"{name} ({ours[0].dtype}, {tuple(ours[0].shape)}): median {kind} error {our_error:.3e} is above {limit:.3e} = "
        f"max({factor} x stock's {stock_error:.3e}, floor {floor:.3e}); {_worst(ours, stock, exact)}"
    )


def _worst(ours: Sequence[Tensor], stock: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    errors = [(a.double() - c).abs().nan_to_num(nan=math.inf) for a, c in zip(ours, exact, strict=True)]
    seed = max(range(len(errors)), key=lambda i: errors[i].max().item())
    index = tuple(int(i) for i in torch.unravel_index(errors[seed].argmax(), errors[seed].shape))
    a, b, c = (float(t[seed][index]) for t in (ours, stock, exact))
    return f"worst in seed {seed} at {index}: ours {a:.9g}, stock {b:.9g}, exact {c:.9g}"


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _largest(t: Tensor) -> float:
    return t.abs().max().item()


def _ulp(dtype: torch.dtype, magnitude: float) -> float:
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(magnitude, info.tiny)))


def assert_within_ulps(ours: Tensor, theirs: Tensor, before: Tensor, name: str = "result", ulps: float = 1) -> None:
    """Raises AssertionError where two updates of ``before`` differ by more ulps of the larger of old and new.

    before: the largest of the terms that the new one is a sum of, where that is more than the old one.

    One is a rounding of the sum that both end in; shapes and dtypes agree. NaN fails.
    """
    assert ours.dtype == theirs.dtype, f"{name}: ours is {ours.dtype}, theirs {theirs.dtype}"
    size = torch.maximum(before.abs(), theirs.abs()).double().clamp(min=torch.finfo(ours.dtype).tiny)
    unit = torch.finfo(ours.dtype).eps * 2.0 ** size.log2().floor()
    off = (ours.double() - theirs.double()).abs() / unit
    worst = off.max().item() if off.numel() else 0.0
    assert worst <= ulps, (
        f"{name}: {int((off > ulps).sum())} of {off.numel()} elements are off by up to {worst:.3g} ulp"
    )
