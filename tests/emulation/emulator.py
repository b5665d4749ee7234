"""CUDA kernels on the CPU: the sources of csrc/cuda, compiled by the host compiler against this folder's device.h."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlpkit.reference import ACTIVATIONS

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
# What every library has; the kernels and the calls into them are the test's choice.
EMULATOR = ("emulator.cpp", "memory.cpp", "tensor.cpp")
# In the order of core/dtype.h.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(
    compiler: str, folder: Path, *, kernels: Sequence[str] = (), calls: Sequence[str], flags: Sequence[str] = ()
) -> ctypes.CDLL:
    """Compiles kernels of csrc/cuda and files of this folder that call them into a shared library, and loads it."""
    library = folder / "libemulator.so"
    # No multiply-add contraction and no flags that change values: the CPU kernels of the `default` instruction set
    # have none either, so that results can be compared bit for bit.
    common = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = ["-I", str(HERE), "-I", str(CSRC)]
    sources = [*(CSRC / "cuda" / name for name in kernels), *(HERE / name for name in (*calls, *EMULATOR))]
    command = [compiler, *common, *flags, *includes, "-x", "c++", *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


class Device:
    """An emulated device. Every run has a schedule of its own, named by its number."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.emulator_error.restype = ctypes.c_char_p
        self.schedule = 0

    def become(self, multiprocessors: int, shared_bytes: int = 227 * 1024) -> None:
        """Sets the number of multiprocessors and the shared memory that a block may have."""
        self._library.emulator_device(multiprocessors, shared_bytes)

    def run(self, name: str, read: Sequence[Tensor | None], written: Sequence[Tensor | None], *args: object) -> None:
        """Calls a launch function; only these tensors may be touched. AssertionError: what the emulator found."""
        self.schedule += 1
        self._library.emulator_begin(ctypes.c_uint32(self.schedule))
        for tensors, writable in ((read, 0), (written, 1)):
            for tensor in tensors:
                if tensor is not None:
                    size = ctypes.c_int64(tensor.nbytes)
                    self._library.emulator_allow(pointer(tensor), size, writable)
        code = getattr(self._library, name)(*args)
        message = self._library.emulator_error().decode()
        assert code == 0, f"{name}, schedule {self.schedule}: error {code} {message}"


class LinearActDropout(Device):
    """The element-wise kernels of linear_act_dropout."""

    def __init__(self, compiler: str, folder: Path, *, calls: Sequence[str] = (), flags: Sequence[str] = ()) -> None:
        kernels = ("column_sums.cu", "linear_act_dropout.cu")
        super().__init__(
            build(compiler, folder, kernels=kernels, calls=["linear_act_dropout.cpp", *calls], flags=flags)
        )
        self._library.emulate_scratch_elements.restype = ctypes.c_int64

    def forward(
        self,
        product: Tensor,
        dtype: torch.dtype,
        activation: str,
        *,
        bias: Tensor | None = None,
        slope: Tensor | None = None,
        negative_slope: float = 0.01,
        p: float = 0.0,
        seed: Tensor | None = None,
        stream: int = 0,
        first_tile: int = 0,
        shift: int = 0,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(y, z, keep, positive)`` for the product of a GEMM; each is written into memory full of 0xff.

        first_tile: where the rows begin in a larger output. shift: elements by which y and z miss a 16-byte boundary.
        in_place: y takes the place of the product.
        """
        rows, cols = product.shape
        y, z = (poisoned(rows * cols, dtype, shift) for _ in range(2))
        if in_place:
            y.copy_(product.reshape(-1))
            product = y
        keep, positive = (poisoned(plane_bytes(rows, cols), torch.uint8) for _ in range(2))
        self.run(
            "emulate_forward",
            [product, bias, slope, seed],
            [y, z, keep, positive],
            *map(ctypes.c_int64, (rows, cols, first_tile)),
            *(DTYPES.index(dtype), ACTIVATIONS.index(activation)),
            *(ctypes.c_double(negative_slope), ctypes.c_double(p), ctypes.c_uint32(stream)),
            *map(pointer, (seed, product, bias, slope)),
            ctypes.c_int64(0 if slope is None else slope.numel()),
            *map(pointer, (y, z, keep, positive)),
        )
        return y.view(rows, cols), z.view(rows, cols), keep, positive

    def backward(
        self,
        dy: Tensor,
        activation: str,
        *,
        z: Tensor | None = None,
        slope: Tensor | None = None,
        negative_slope: float = 0.01,
        p: float = 0.0,
        keep: Tensor | None = None,
        positive: Tensor | None = None,
        shift: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dz, dbias, dslope)`` of what the forward pass saved; dslope is empty without a slope."""
        rows, cols = dy.shape
        dz = poisoned(rows * cols, dy.dtype, shift)
        dbias, dslope = poisoned(cols, dy.dtype), poisoned(0 if slope is None else slope.numel(), dy.dtype)
        elements = self._library.emulate_scratch_elements(ctypes.c_int64(rows), ctypes.c_int64(cols))
        scratch = poisoned(elements, torch.float64 if dy.dtype == torch.float64 else torch.float32)
        self.run(
            "emulate_backward",
            [dy, z, slope, keep, positive],
            [dz, dbias, dslope, scratch],
            *(ctypes.c_int64(rows), ctypes.c_int64(cols), DTYPES.index(dy.dtype), ACTIVATIONS.index(activation)),
            *(ctypes.c_double(negative_slope), ctypes.c_double(p)),
            *map(pointer, (dy, z, slope)),
            ctypes.c_int64(0 if slope is None else slope.numel()),
            *map(pointer, (keep, positive, dz, dbias, None if slope is None else dslope, scratch)),
        )
        return dz.view(rows, cols), dbias, dslope


def plane(bits: Tensor) -> Tensor:
    """Bools (rows, cols) as a bit plane: byte l of a 16x16 tile is lane l's, bit 2 w + h half h of its word w."""
    rows, cols = bits.shape
    tiles = (math.ceil(rows / 16), math.ceil(cols / 16))
    padded = np.zeros((tiles[0] * 16, tiles[1] * 16), dtype=np.uint8)
    padded[:rows, :cols] = bits.numpy()
    # Axes: row tile, lower half, row, col tile, right half, pair of columns, odd column.
    parts = padded.reshape(tiles[0], 2, 8, tiles[1], 2, 4, 2).transpose(0, 3, 2, 5, 4, 1, 6)
    weights = np.array([1, 2, 4, 8, 16, 32, 64, 128], dtype=np.uint8)
    return torch.from_numpy((parts.reshape(-1, 8) * weights).sum(axis=1, dtype=np.uint8))


def inside(rows: int, cols: int) -> Tensor:
    """The bits of a plane that belong to an element; the rest of a ragged tile may hold anything."""
    return plane(torch.ones(rows, cols, dtype=torch.bool))


def plane_bytes(rows: int, cols: int) -> int:
    return math.ceil(rows / 16) * math.ceil(cols / 16) * 32


def poisoned(elements: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    size = dtype.itemsize
    return torch.full(((elements + shift) * size,), 0xFF, dtype=torch.uint8).view(dtype)[shift:]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None or tensor.numel() == 0 else tensor.data_ptr())
