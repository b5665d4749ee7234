"""The visitor nodes of the wide kernels on the CPU, beside the element-wise kernels that do the same to a product."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from emulator import DTYPES, LinearActDropout, plane_bytes, pointer, poisoned
from torch import Tensor

from mlpkit.reference import ACTIVATIONS

SCHEDULES = ("cooperative", "pingpong")


def find_cutlass() -> Path | None:
    """CUTLASS's headers as the build finds them: CUTLASS_PATH, or the package nvidia-cutlass."""
    roots = [Path(os.environ["CUTLASS_PATH"])] if os.environ.get("CUTLASS_PATH") else []
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        roots.append(Path(spec.origin).parent / "source")
    return next((root / "include" for root in roots if (root / "include" / "cutlass" / "cutlass.h").exists()), None)


def find_cuda_headers() -> Path | None:
    """Those of the nvcc on PATH, which says where it lies, or of PyPI's packages."""
    roots = sorted((Path(sysconfig.get_paths()["purelib"]) / "nvidia").glob("*/include"))
    nvcc = shutil.which("nvcc")
    if nvcc:
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        top = re.search(r"TOP=(\S+)", told.stderr)
        roots = [Path(top.group(1)) / "include", *roots] if top else roots
    return next((root for root in roots if (root / "cuda_runtime_api.h").exists()), None)


class WideLayer(LinearActDropout):
    """The nodes and the element-wise kernels in one emulator."""

    def __init__(self, compiler: str, folder: Path, cutlass: Path, cuda: Path) -> None:
        system = [cutlass, cuda, cuda / "cccl"]
        # CUTLASS's conversions name device functions that the host has not; none of them is instantiated.
        flags = ["-DMLPKIT_EMULATED_CUTLASS", "-fpermissive", *(f"-isystem{path}" for path in system)]
        super().__init__(compiler, folder, calls=["wide_nodes.cpp"], flags=flags)
        self._library.emulate_column_sums_elements.restype = ctypes.c_int64

    def wide_forward(
        self,
        product: Tensor,
        dtype: torch.dtype,
        activation: str,
        *,
        schedule: str = "cooperative",
        bias: Tensor | None = None,
        p: float = 0.0,
        seed: Tensor | None = None,
        stream: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(y, keep, positive, census)``; census is the largest finite magnitude's bits and the non-finite flag."""
        rows, cols = product.shape
        y = poisoned(rows * cols, dtype)
        keep, positive = (poisoned(plane_bytes(rows, cols), torch.uint8) for _ in range(2))
        census = torch.zeros(2, dtype=torch.int32)
        self.run(
            "emulate_wide_forward",
            [product, bias, seed],
            [y, keep, positive, census],
            *(ctypes.c_int64(rows), ctypes.c_int64(cols), DTYPES.index(dtype), SCHEDULES.index(schedule)),
            *(ACTIVATIONS.index(activation), ctypes.c_double(0.01), ctypes.c_double(p), ctypes.c_uint32(stream)),
            *map(pointer, (seed, product, bias, y, keep, positive, census)),
        )
        return y.view(rows, cols), keep, positive, census

    def wide_backward(
        self,
        dy: Tensor,
        dtype: torch.dtype,
        activation: str,
        *,
        z: Tensor | None = None,
        p: float = 0.0,
        keep: Tensor | None = None,
        positive: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(dz, dbias)`` from the product ``dy`` in float32."""
        rows, cols = dy.shape
        dz, dbias = poisoned(rows * cols, dtype), poisoned(cols, dtype)
        row_tiles, stride = math.ceil(rows / 16), math.ceil(cols / 16) * 16
        elements = self._library.emulate_column_sums_elements(ctypes.c_int64(row_tiles), ctypes.c_int64(stride))
        sums = poisoned(elements, torch.float32)
        self.run(
            "emulate_wide_backward",
            [dy, z, keep, positive],
            [dz, dbias, sums],
            *(ctypes.c_int64(rows), ctypes.c_int64(cols), DTYPES.index(dtype), ACTIVATIONS.index(activation)),
            *(ctypes.c_double(0.01), ctypes.c_double(p)),
            *map(pointer, (dy, z, keep, positive, dz, dbias, sums)),
            ctypes.c_int64(stride),
        )
        return dz.view(rows, cols), dbias
