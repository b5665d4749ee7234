"""Under ``torch.func`` transforms: activation and dropout by PyTorch's own ops, which know grad, vmap, jvp, ...."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlpkit import reference

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def transformed() -> bool:
    """Whether a ``torch.func`` transform is at work; a compiler sees through those itself."""
    return bool(torch._C._are_functorch_transforms_active()) and not torch.compiler.is_compiling()


def act_dropout(
    z: Tensor, activation: str, slope: float | Tensor | None, p: float, seed: Tensor | None, stream: int
) -> Tensor:
    """Activation, then the mask of ``docs/masks.md``; seed None where nothing is dropped."""
    rows, cols = math.prod(z.shape[:-1]), z.shape[-1]
    # F.prelu looks for its channels in dimension 1; the features here are in the last one.
    y = reference.activate(z.reshape(rows, cols), activation, slope).reshape(z.shape)
    threshold = math.floor(65536 * p + 0.5)
    if threshold == 0 or seed is None:
        return y
    if threshold == 65536:
        return y * 0.0
    keep = _bits(rows, cols, seed, stream) >= threshold
    return y * keep.to(y.dtype).reshape(y.shape) * (65536 / (65536 - threshold))


def _bits(rows: int, cols: int, seed: Tensor, stream: int) -> Tensor:
    """16 bits an element, (rows, cols), those of ``reference.dropout_mask``; the seed may be a transform's tensor."""
    tiles = (math.ceil(rows / 16), math.ceil(cols / 16))
    tile = torch.arange(tiles[0] * tiles[1], device=seed.device)[:, None]
    lane = torch.arange(32, device=seed.device)[None, :]
    key, offset = seed[0], seed[1]
    words = _philox(
        (tile & _LOW, (tile >> 32 << 5) | lane, offset & _LOW, torch.full_like(tile, stream)),
        (key & _LOW, (key >> 32) & _LOW),
    )
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    # Axes: row tile, column tile, lane = 4 * row + pair of columns, word = 2 * right + lower half, even or odd column.
    bits = halves.reshape(*tiles, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    return bits.reshape(tiles[0] * 16, tiles[1] * 16)[:rows, :cols]


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) in int64 that hold 32 bits each; the four words in a last dimension."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (left_high, left), (right_high, right) = _product(_MULTIPLIERS[0], c0), _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = right_high ^ c1 ^ k0, right, left_high ^ c3 ^ k1, left
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, by halves of b: the whole product would not fit a signed int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
