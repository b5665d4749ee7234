"""What the fused ops compute, in NumPy and stock PyTorch alone: no native code, the text that tests compare with."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit.errors import ArgumentError

__all__ = ["ACTIVATIONS", "activate", "dropout_mask", "linear_act_dropout", "norm_act_dropout", "philox4x32"]

Words = npt.NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

_WITHOUT_SLOPE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

ACTIVATIONS = ("identity", "relu", "leaky_relu", "prelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike, rounds: int = 10) -> Words:
    """Same as Random123's ``philox4x32_R``: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".

    counter: (..., 4) and key: (..., 2) unsigned 32-bit words, leading dimensions broadcast; returns (..., 4) words.
    """
    words = np.asarray(counter, dtype=np.uint64)
    keys = np.asarray(key, dtype=np.uint64)
    c0, c1, c2, c3 = (words[..., i] for i in range(4))
    k0, k1 = keys[..., 0], keys[..., 1]
    for _ in range(rounds):
        # 32 x 32 -> 64 bits never overflows, so the high and low halves are exact.
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (right >> _SHIFT) ^ c1 ^ k0, right & _LOW, (left >> _SHIFT) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def dropout_mask(rows: int, cols: int, p: float, seed: int, offset: int = 0, stream: int = 0) -> tuple[Tensor, float]:
    """Which elements of a (rows, cols) output survive dropout, and their factor: the contract of ``docs/masks.md``.

    p: probability of being dropped, in [0, 1]; seed, offset: 64-bit integers (offset enters by its low 32 bits);
    stream: the layer's index, 32 bits. Returns ``(keep, scale)``: a bool tensor (rows, cols) and
    ``65536 / (65536 - round(65536 p))``, or 0.0 where nothing survives.
    Raises ArgumentError when p lies outside [0, 1].
    """
    threshold = _threshold(p)
    if threshold in (0, 65536):
        return torch.full((rows, cols), threshold == 0), 1.0 if threshold == 0 else 0.0
    tiles = (math.ceil(rows / 16), math.ceil(cols / 16))
    tile = np.arange(tiles[0] * tiles[1], dtype=np.uint64)[:, None]
    lane = np.arange(32, dtype=np.uint64)[None, :]
    counter = np.empty((tile.shape[0], 32, 4), dtype=np.uint64)
    counter[..., 0] = tile & _LOW
    counter[..., 1] = ((tile >> _SHIFT) << np.uint64(5)) | lane
    counter[..., 2] = offset & 0xFFFFFFFF
    counter[..., 3] = stream & 0xFFFFFFFF
    words = philox4x32(counter, [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    # Axes: row tile, column tile, lane = 4 * row + pair of columns, word = 2 * right + lower half, even or odd column.
    halves = halves.reshape(*tiles, 8, 4, 2, 2, 2)
    bits = halves.transpose(0, 5, 2, 1, 4, 3, 6).reshape(tiles[0] * 16, tiles[1] * 16)
    return torch.from_numpy(bits[:rows, :cols] >= threshold), 65536 / (65536 - threshold)


def activate(z: Tensor, activation: str, slope: float | Tensor | None = None) -> Tensor:
    """The named activation of z by stock PyTorch; slope: a float for leaky_relu (0.01 if None), a tensor for prelu.

    z: any shape, floating; returns its shape and dtype. prelu's slope: 1 element, or one a feature of (rows, features).
    Raises ArgumentError when the name is unknown or prelu has no slope.
    """
    if activation == "leaky_relu":
        return F.leaky_relu(z, 0.01 if slope is None else float(slope))
    if activation == "prelu":
        if not isinstance(slope, Tensor):
            raise ArgumentError(f"activate: prelu wants a slope tensor, got {slope!r}")
        return F.prelu(z, slope)
    if activation not in _WITHOUT_SLOPE:
        raise ArgumentError(f"activate: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    return _WITHOUT_SLOPE[activation](z)


def linear_act_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "relu",
    slope: float | Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Same as ``act(F.linear(x, weight, bias)) * keep * scale`` with the mask of ``dropout_mask``.

    x: (..., in_features); weight: (out_features, in_features); bias: (out_features,) or None; slope as in ``activate``,
    prelu's of 1 or out_features elements; returns (..., out_features) in x's dtype, any floating dtype; differentiable
    as often as its parts are. seed: an int s, which stands for (s, 0), or an int64 tensor (seed, offset).
    Raises ArgumentError when dropout is on and seed is None: the reference draws none.
    """
    return _act_dropout(F.linear(x, weight, bias), activation, slope, p if training else 0.0, seed, stream)


def norm_act_dropout(
    z: Tensor,
    norm: str | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    slope: float | Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Same as ``act(F.batch_norm(z, ...)) * keep * scale``, or with ``F.layer_norm``, or with no norm.

    z: (..., features), whose leading dimensions are rows, of any floating dtype; weight, bias, running_mean,
    running_var: (features,) or None; slope and seed as ``functional.norm_act_dropout``'s, and the running averages are
    moved as there. Differentiable as often as its parts are. Raises ArgumentError as
    ``linear_act_dropout`` here, and for an unknown norm.
    """
    if norm not in (None, "batch", "layer"):
        raise ArgumentError(f"reference.norm_act_dropout: norm is {norm!r}; it must be batch, layer or None")
    u = z
    if norm == "layer":
        u = F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    elif norm == "batch":
        rows = z.reshape(-1, z.shape[-1])
        u = F.batch_norm(rows, running_mean, running_var, weight, bias, training, momentum, eps).reshape(z.shape)
    return _act_dropout(u, activation, slope, p if training else 0.0, seed, stream)


def _act_dropout(
    z: Tensor, activation: str, slope: float | Tensor | None, p: float, seed: int | Tensor | None, stream: int
) -> Tensor:
    rows, cols = math.prod(z.shape[:-1]), z.shape[-1]
    # F.prelu looks for its channels in dimension 1; the features here are in the last one.
    y = activate(z.reshape(rows, cols), activation, slope).reshape(z.shape)
    if _threshold(p) == 0:
        return y
    if seed is None:
        raise ArgumentError("reference: seed is None, but with p > 0 the reference wants one given")
    key, offset = (int(seed), 0) if not isinstance(seed, Tensor) else (int(word) for word in seed.tolist())
    keep, scale = dropout_mask(rows, cols, p, key, offset, stream)
    # A product and no torch.where: a dropped Inf is NaN, as in stock dropout. The scale multiplies as a Python number,
    # in the dtype that PyTorch computes in, so that it is not rounded to 8 bits for bfloat16.
    return y * keep.to(y).reshape(y.shape) * scale


def _threshold(p: float) -> int:
    """``round(65536 p)``, halves up: of 65536 equally likely 16-bit numbers this many mean "dropped"."""
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(f"dropout: p is {p}, it must lie in [0, 1]")
    return math.floor(65536 * p + 0.5)
