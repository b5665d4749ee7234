"""Checks and draws that the functions share; ``owner`` is the function's name, for the message."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from mlpkit.ops.linear_act_dropout import ACTIVATIONS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEFAULT_NEGATIVE_SLOPE = 0.01


def drawn_seed(owner: str, seed: int | Tensor | None, x: Tensor) -> Tensor:
    """The seed as the op takes it: int64 (seed, offset) on x's device; drawn by torch's generator for None."""
    if seed is None:
        if torch.compiler.is_compiling():
            return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
        drawn: Tensor = _C.drawn_seed(x.device)
        return drawn
    if isinstance(seed, Tensor):
        return seed
    check_seed(owner, seed, x)
    # The int64 with the same 64 bits, so that unsigned seeds are welcome too.
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor((signed, 0), dtype=torch.int64, device=x.device)


def probability(p: float) -> bool:
    """Whether p is a number in [0, 1]."""
    return isinstance(p, (int, float)) and 0.0 <= p <= 1.0


def negative_slope_fits(activation: str, slope: float) -> bool:
    """Whether a float slope fits the activation."""
    return activation == "leaky_relu" and isinstance(slope, (int, float)) and math.isfinite(slope)


def check_activation(owner: str, activation: str, p: float, stream: int) -> None:
    """Raise ArgumentError for an unknown activation, a p that is no probability, or a stream out of range."""
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"{owner}: activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if not probability(p):
        raise ArgumentError(f"{owner}: p is {p!r}; it must be a number in [0, 1]")
    if not 0 <= stream < 2**32:
        raise ArgumentError(f"{owner}: stream is {stream}; it must lie in [0, 2^32)")


def check_dense(owner: str, tensors: dict[str, Tensor | None], needed: tuple[str, ...]) -> None:
    """Raise ArgumentError for what is no dense tensor; only what is not needed may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in needed):
            raise ArgumentError(f"{owner}: {name} is {type(tensor).__name__}; it must be a tensor")
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise ArgumentError(f"{owner}: {name} is {tensor.layout}; it must be strided (dense)")


def check_slope(owner: str, activation: str, slope: float | Tensor | None, cols: int) -> None:
    """Raise ArgumentError or ShapeError for a slope that is not the activation's."""
    if activation == "prelu":
        if not isinstance(slope, Tensor):
            raise ArgumentError(f"{owner}: slope is {slope!r}; prelu wants a tensor of 1 or out_features elements")
        if slope.dim() > 1 or slope.numel() not in (1, cols):
            raise ShapeError(f"{owner}: slope has shape {tuple(slope.shape)}; it must have 1 or {cols} values")
    elif isinstance(slope, Tensor):
        raise ArgumentError(f"{owner}: slope is a tensor; {activation} takes a float or none, prelu a tensor")
    elif slope is not None and activation != "leaky_relu":
        raise ArgumentError(f"{owner}: slope is {slope!r}; {activation} takes none")
    elif slope is not None and not negative_slope_fits(activation, slope):
        raise ArgumentError(f"{owner}: slope is {slope!r}; leaky_relu takes a finite number")


def check_seed(owner: str, seed: int | Tensor | None, x: Tensor) -> None:
    """Raise ArgumentError or DeviceError for what is neither an int of 64 bits nor (seed, offset) on x's device."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
            raise ArgumentError(
                f"{owner}: seed is a {seed.dtype} tensor of shape {tuple(seed.shape)}; "
                "it must be int64 of shape (2,): seed and offset"
            )
        if seed.device != x.device:
            raise DeviceError(f"{owner}: seed is on {seed.device}; it must be on the input's {x.device}")
    elif seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**64):
        raise ArgumentError(f"{owner}: seed is {seed!r}; it must be an int of 64 bits or an int64 tensor")


def check_placement(owner: str, name: str, x: Tensor, others: dict[str, Tensor], *, wide: bool = False) -> None:
    """Raise DtypeError or DeviceError where dtype or device of the others is not x's, whose argument is ``name``.

    wide: float32 is welcome beside an x of 16 bits.
    """
    if x.dtype not in DTYPES:
        raise DtypeError(f"{owner}: {name} is {x.dtype}; it must be float64, float32, bfloat16 or float16")
    low = wide and x.dtype in (torch.bfloat16, torch.float16)
    for other, tensor in others.items():
        if tensor.device != x.device:
            raise DeviceError(f"{owner}: {other} is on {tensor.device}; it must be on {name}'s {x.device}")
        if tensor.dtype == x.dtype or (low and tensor.dtype == torch.float32):
            continue
        if wide or not torch.is_autocast_enabled(x.device.type):
            also = " or float32" if low else ""
            raise DtypeError(f"{owner}: {other} is {tensor.dtype}; it must be {name}'s {x.dtype}{also}")
    if x.device.type not in ("cpu", "cuda"):
        raise DeviceError(f"{owner}: {name} is on {x.device}; mlpkit has kernels for cpu and cuda")
