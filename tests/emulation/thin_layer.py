"""linear_act_dropout by the emulated thin kernels, as a differentiable function."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from emulator import DTYPES, Device, build, plane_bytes, pointer, poisoned
from torch import Tensor

from mlpkit.reference import ACTIVATIONS

NEEDS_Z = ("prelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
KERNELS = ("column_sums.cu", "linear_act_dropout_thin_forward.cu", "linear_act_dropout_thin_backward.cu")


class Saved(NamedTuple):
    y: Tensor
    z: Tensor | None
    keep: Tensor | None
    positive: Tensor | None


class Gradients(NamedTuple):
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dslope: Tensor | None


class ThinLayer(Device):
    """shift: elements by which y, z and dy miss a 16-byte boundary."""

    def __init__(self, compiler: str, folder: Path) -> None:
        super().__init__(build(compiler, folder, kernels=KERNELS, calls=["linear_act_dropout_thin.cpp"]))
        self._library.emulate_thin_scratch.restype = ctypes.c_int64

    def takes(self, dtype: torch.dtype, depth: int) -> bool:
        return bool(self._library.emulate_thin_takes(DTYPES.index(dtype), ctypes.c_int64(depth)))

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str,
        slope: Tensor | None = None,
        negative_slope: float = 0.01,
        p: float = 0.0,
        seed: Tensor | None = None,
        stream: int = 0,
        shift: int = 0,
    ) -> Saved:
        """What the op saves; every output is written into memory full of 0xff."""
        (rows, depth), cols = x.shape, weight.shape[0]
        draws = 0 < int(65536 * p + 0.5) < 65536
        y = poisoned(rows * cols, x.dtype, shift)
        z = poisoned(rows * cols, x.dtype, shift) if activation in NEEDS_Z else None
        bits = lambda wanted: poisoned(plane_bytes(rows, cols), torch.uint8) if wanted else None  # noqa: E731
        keep, positive = bits(draws or activation == "relu"), bits(activation == "leaky_relu")
        seed = seed if draws else None
        self.run(
            "emulate_thin_forward",
            [x, weight, bias, slope, seed],
            [y, z, keep, positive],
            *map(ctypes.c_int64, (rows, cols, depth)),
            *(DTYPES.index(x.dtype), ACTIVATIONS.index(activation)),
            *(ctypes.c_double(negative_slope), ctypes.c_double(p), ctypes.c_uint32(stream)),
            *map(pointer, (seed, x, weight, bias, slope)),
            ctypes.c_int64(0 if slope is None else slope.numel()),
            *map(pointer, (y, z, keep, positive)),
        )
        return Saved(y.view(rows, cols), None if z is None else z.view(rows, cols), keep, positive)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Saved,
        *,
        activation: str,
        slope: Tensor | None = None,
        negative_slope: float = 0.01,
        p: float = 0.0,
        wanted: tuple[bool, bool, bool] = (True, True, True),
    ) -> Gradients:
        (rows, depth), cols = x.shape, weight.shape[0]
        dx, dweight, dbias = (
            poisoned(size, x.dtype) if want else None for size, want in zip((rows * depth, cols * depth, cols), wanted)
        )
        dslope = None if slope is None else poisoned(slope.numel(), x.dtype)
        size = self._library.emulate_thin_scratch(*map(ctypes.c_int64, (rows, cols, depth)))
        scratch = poisoned(size, torch.float32)
        self.run(
            "emulate_thin_backward",
            [dy, x, weight, saved.z, slope, saved.keep, saved.positive],
            [dx, dweight, dbias, dslope, scratch],
            *map(ctypes.c_int64, (rows, cols, depth)),
            *(DTYPES.index(x.dtype), ACTIVATIONS.index(activation)),
            *(ctypes.c_double(negative_slope), ctypes.c_double(p)),
            *map(pointer, (dy, x, weight, saved.z, slope)),
            ctypes.c_int64(0 if slope is None else slope.numel()),
            *map(pointer, (saved.keep, saved.positive, dx, dweight, dbias, dslope, scratch)),
        )
        shaped = lambda t, like: None if t is None else t.view(like.shape)  # noqa: E731
        return Gradients(shaped(dx, x), shaped(dweight, weight), dbias, shaped(dslope, slope))

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str,
        slope: Tensor | float | None = None,
        p: float,
        seed: Tensor,
        stream: int,
    ) -> Tensor:
        """As ``mlpkit.reference.linear_act_dropout``."""
        options = {"activation": activation, "p": p}
        if isinstance(slope, float):
            options["negative_slope"], slope = slope, None
        result: Tensor = _Layer.apply(self, x, weight, bias, slope, seed, stream, options)
        return result


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, device, x, weight, bias, slope, seed, stream, options):
        saved = device.forward(x, weight, bias, slope=slope, seed=seed, stream=stream, **options)
        ctx.device, ctx.options, ctx.saved, ctx.inputs = device, options, saved, (x, weight, bias, slope)
        return saved.y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, slope = ctx.inputs
        wanted = (True, True, bias is not None)
        dx, dweight, dbias, dslope = ctx.device.backward(
            dy, x, weight, ctx.saved, slope=slope, wanted=wanted, **ctx.options
        )
        return None, dx, dweight, dbias, dslope, None, None, None
