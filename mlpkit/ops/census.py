"""``census``: every special value of a tensor counted in one pass. Kernels: csrc/ops/census.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlpkit import _build_config
from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DtypeError

BINS = 64
LOWEST_EXPONENT = -40
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COLUMNS = 8


@dataclass(frozen=True)
class Census:
    """Counts and extremes of one tensor; ``print`` shows them in one line.

    nan, posinf, neginf, zero, subnormal: how many elements are that (subnormal in the tensor's own dtype).
    above_fp16_max: finite elements with |x| > 65504; below_fp16_min: non-zero ones with |x| < 2^-14, the smallest
    normal float16. absmax and min_nonzero: largest and smallest non-zero magnitude of the finite part, 0 without one.
    first_nonfinite: flat (row-major) index of the first NaN or Inf, or -1. histogram: 64 counts of floor(log2 |x|) over
    the finite non-zero part, from -40 (and below) to 23 (and above); None unless asked for.
    """

    shape: tuple[int, ...]
    dtype: str
    nan: int
    posinf: int
    neginf: int
    zero: int
    subnormal: int
    above_fp16_max: int
    below_fp16_min: int
    absmax: float
    min_nonzero: float
    first_nonfinite: int
    histogram: tuple[int, ...] | None = None

    @property
    def finite(self) -> bool:
        """Holds neither NaN nor Inf."""
        return self.nan + self.posinf + self.neginf == 0

    @property
    def headroom(self) -> float:
        """Bits between absmax and the dtype's largest number, log2(max / absmax); Inf where absmax is 0."""
        limit = torch.finfo(getattr(torch, self.dtype)).max
        return math.log2(limit) - math.log2(self.absmax) if self.absmax else math.inf

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.shape) or "scalar"
        counts = f"NaN {self.nan}, Inf {self.posinf}, -Inf {self.neginf}, zero {self.zero}, subnormal {self.subnormal}"
        extent = f"|x| {self.min_nonzero:.3g} to {self.absmax:.3g}" if self.absmax else "|x| nothing finite but 0"
        return f"{shape} {self.dtype}: {extent}, {counts}, headroom {self.headroom:.1f} bits"


def census(tensor: Tensor, *, histogram: bool = False) -> Census:
    """Count a tensor's NaN, Inf, zero, subnormal and out-of-float16 elements, with its extremes, in one pass.

    tensor: float64, float32, float16 or bfloat16, any shape and strides, empty too; a CUDA tensor is counted there with
    ``MLPKIT_CUDA_KERNELS=all``, otherwise on the host. histogram: also count exponents. Raises ArgumentError for what
    is no dense tensor, DtypeError for another dtype.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ArgumentError(f"census: got {_describe(tensor)}, must be a dense tensor")
    if tensor.dtype not in _DTYPES:
        raise DtypeError(f"census: the tensor is {tensor.dtype}, must be float64, float32, float16 or bfloat16")
    here = tensor.detach()
    if not (here.is_cuda and _build_config.CUDA and _C.cuda_kernels() == "all"):
        here = here.cpu()
    counts, extremes, bins = torch.ops.mlpkit.census([here], histogram)
    nan, posinf, neginf, zero, subnormal, above, below, first = counts[0].tolist()
    absmax, min_nonzero = extremes[0].tolist()
    return Census(
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        nan,
        posinf,
        neginf,
        zero,
        subnormal,
        above,
        below,
        absmax,
        min_nonzero,
        first,
        tuple(bins[0].tolist()) if histogram else None,
    )


def _describe(value: object) -> str:
    return f"a {value.layout} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@torch.library.register_fake("mlpkit::census")  # type: ignore[untyped-decorator]
def _census_fake(tensors: Sequence[Tensor], histogram: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    rows, first = len(tensors), tensors[0]
    return (
        first.new_empty((rows, _COLUMNS), dtype=torch.int64),
        first.new_empty((rows, 2), dtype=torch.float64),
        first.new_empty((rows, BINS if histogram else 0), dtype=torch.int64),
    )
