"""An emulated device for populations: ``Population(..., device="cuda")`` runs the kernels thread by thread here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from emulator import build

from mlpkit._ext import _C

PLAN = ("warps", "rows", "resident", "gradients_in_shared", "shared_bytes")


class EmulatedPopulations:
    def __init__(self, compiler: str, folder: Path) -> None:
        self._library = build(compiler, folder, kernels=("population.cu",), calls=["population.cpp"])
        self._library.emulated_population_device.restype = ctypes.c_void_p
        self._library.emulated_population_launches.restype = ctypes.c_int64

    @contextmanager
    def offered(self, multiprocessors: int = 1, shared_bytes: int = 227 * 1024) -> Iterator[EmulatedPopulations]:
        """Populations on device 0 run here meanwhile."""
        kernels = _C.cuda_kernels()
        before = _C.offer_population_device(self._library.emulated_population_device(multiprocessors, shared_bytes))
        _C.force_cuda_kernels("all")
        try:
            yield self
        finally:
            _C.offer_population_device(before)
            _C.force_cuda_kernels(kernels)

    @property
    def launches(self) -> int:
        return int(self._library.emulated_population_launches())

    def plan(
        self,
        widths: Sequence[int],
        batch: int,
        *,
        precision: str = "bf16",
        keeps_slopes: bool = False,
        moments: int = 2,
        multiprocessors: int = 132,
        shared_bytes: int = 227 * 1024,
    ) -> dict[str, int] | None:
        found = (ctypes.c_int * len(PLAN))()
        code = self._library.emulated_population_plan(
            *(int(precision == "fp32"), len(widths) - 1, (ctypes.c_int * len(widths))(*widths), batch),
            *(int(keeps_slopes), moments, multiprocessors, shared_bytes, found),
        )
        return None if code else dict(zip(PLAN, found, strict=True))
