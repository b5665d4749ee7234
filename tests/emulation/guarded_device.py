"""The guarded update on the emulated device: a list of tensors, and the same list for the CPU's kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulator import DTYPES, Device, build, pointer
from torch import Tensor

from mlpkit.ops.guarded_update import KINDS, GroupSettings, Outcome, ScaleRule, guarded_update

_ADDRESSES = ("p", "first", "second", "third", "copy", "step")
TENSOR = np.dtype(
    [(name, np.int64) for name in (*_ADDRESSES, "count", "first_chunk")]
    + [(name, np.int32) for name in ("index", "group", "dtype", "gradient_dtype", "copy_dtype", "wide_step")]
    + [("padding", np.int64)]
)
GROUP = np.dtype([("numbers", np.float64, 9), ("flags", np.bool_, 4), ("rate", np.int64)], align=True)
STATE = ("first", "second", "third")
SKIPS, SKIP = 32, 12
_STAYS = ScaleRule(interval=0)


class GuardedDevice(Device):
    """An emulated device with the guarded update's kernels."""

    def __init__(self, compiler: str, folder: Path) -> None:
        # Optimised as little as the others; contraction is off, as it is for the device.
        kernels = ["guarded_census.cu", "guarded_update.cu"]
        super().__init__(build(compiler, folder, kernels=kernels, calls=["guarded_update.cpp"]))
        library = self._library
        assert library.emulate_bytes_of_tensor() == TENSOR.itemsize
        assert library.emulate_bytes_of_group() == GROUP.itemsize
        library.emulate_guarded_new.restype = ctypes.c_void_p
        for name in ("emulate_guarded_log", "emulate_guarded_bounds"):
            getattr(library, name).restype = ctypes.POINTER(ctypes.c_double)


class Tensors:
    """Parameters, gradients and state of one optimizer, the same for the same arguments.

    shift: elements by which all of them miss a 16-byte boundary. copy: dtype of low-precision copies.
    """

    def __init__(
        self,
        kind: str,
        settings: GroupSettings,
        dtype: torch.dtype = torch.float32,
        gradient: torch.dtype | None = None,
        sizes: Sequence[int] = (700, 9000, 1, 0, 33),
        shift: int = 0,
        copy: torch.dtype | None = None,
        steps: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(sizes))

        def draw(size: int, of: torch.dtype, low: float = -1.0) -> Tensor:
            numbers = torch.rand(size + shift, generator=generator) * (1 - low) + low
            return numbers.to(of)[shift:]

        adam = kind in ("adam", "adamw", "lamb")
        needs = (
            adam or settings.momentum != 0,
            adam or kind == "rmsprop",
            settings.amsgrad or settings.centered,
        )
        self.kind, self.settings = kind, settings
        self.p = [draw(size, dtype) for size in sizes]
        self.g: list[Tensor | None] = [draw(size, gradient or dtype) for size in sizes]
        # A centred variance must not come out negative: third is the mean of what second is the mean square of.
        lows = {"first": -0.5, "second": 0.8, "third": 0.6}
        self.state = {
            name: [draw(size, dtype, lows[name]) for size in sizes] if need else [] for name, need in zip(STATE, needs)
        }
        if settings.centered:
            self.state["third"] = [tensor * 0.5 for tensor in self.state["third"]]
        self.copies = [draw(size, copy) for size in sizes] if copy else []
        self.steps = [torch.tensor(3.0) for _ in sizes] if steps else []

    def all(self) -> list[Tensor]:
        return [*self.p, *(one for rows in self.state.values() for one in rows), *self.copies, *self.steps]

    def on_cpu(self, **options: Any) -> Outcome:
        return guarded_update(
            self.p,
            [g for g in self.g if g is not None],
            kind=self.kind,
            settings=[self.settings],
            steps=self.steps,
            copies=self.copies,
            **self.state,
            **options,
        )


class Session:
    """Steps of ``Tensors`` on the device, whose table and bounds last from one to the next."""

    def __init__(self, device: GuardedDevice, tensors: Tensors, chunk: int = 0) -> None:
        self._device, self.tensors = device, tensors
        table = np.zeros(len(tensors.p), TENSOR)
        for i, p in enumerate(tensors.p):
            entry = table[i]
            lists = {"p": tensors.p, **tensors.state, "copy": tensors.copies, "step": tensors.steps}
            for name, of in lists.items():
                entry[name] = of[i].data_ptr() if of else 0
            gradient = tensors.g[i]
            entry["count"], entry["index"] = p.numel(), i
            entry["dtype"] = DTYPES.index(p.dtype)
            entry["gradient_dtype"] = DTYPES.index(p.dtype if gradient is None else gradient.dtype)
            entry["copy_dtype"] = DTYPES.index(tensors.copies[i].dtype) if tensors.copies else 0
            entry["wide_step"] = bool(tensors.steps) and tensors.steps[i].dtype == torch.float64
        rows = torch.from_numpy(table.view(np.uint8))
        library = device._library
        self._handle = ctypes.c_void_p(
            library.emulate_guarded_new(
                KINDS.index(tensors.kind), pointer(rows), ctypes.c_int64(len(table)), ctypes.c_int64(chunk)
            )
        )
        device.run("emulate_guarded_prepare", [], [], self._handle)

    def close(self) -> None:
        self._device._library.emulate_guarded_delete(self._handle)

    def _numbers(self, name: str, count: int) -> Tensor:
        values = getattr(self._device._library, name)(self._handle)
        return torch.tensor(values[:count], dtype=torch.float64)

    @property
    def bounds(self) -> Tensor:
        return self._numbers("emulate_guarded_bounds", 4 * len(self.tensors.p)).view(-1, 4)

    @property
    def log(self) -> tuple[int, int, Tensor]:
        """(steps, skips, the last skips)"""
        numbers = self._numbers("emulate_guarded_log", 2 + SKIPS * SKIP)
        return int(numbers[0]), int(numbers[1]), numbers[2:].view(SKIPS, SKIP)

    def step(
        self,
        clip_norm: float = math.inf,
        scale: Tensor | None = None,
        clean_steps: Tensor | None = None,
        found_inf: Tensor | None = None,
        rule: ScaleRule = _STAYS,
        force: bool = False,
        inline: bool = True,
        tries: bool = False,
        rate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(outcome, census) as the op returns them."""
        tensors, device = self.tensors, self._device
        group = np.zeros(1, GROUP)
        numbers = astuple(tensors.settings)
        group["numbers"], group["flags"] = numbers[:9], numbers[9:]
        group["rate"] = 0 if rate is None else rate.data_ptr()
        groups = torch.from_numpy(group.view(np.uint8))
        limits = torch.tensor([rule.growth, rule.backoff, rule.floor, rule.ceiling], dtype=torch.float64)
        addresses = [0 if g is None else g.data_ptr() or 16 for g in tensors.g]
        gradients = (ctypes.c_void_p * len(addresses))(*addresses)
        outcome = torch.full((6,), math.nan, dtype=torch.float64)
        census = torch.full((len(tensors.p), 5), math.nan, dtype=torch.float64)
        device.run(
            "emulate_guarded_step",
            [*tensors.g, rate],
            [scale, clean_steps, found_inf, outcome, census, *tensors.all()],
            *(self._handle, gradients, pointer(groups), ctypes.c_int64(1)),
            *(int(inline), int(tries), int(force), pointer(limits), ctypes.c_int64(rule.interval)),
            ctypes.c_double(clip_norm),
            *map(pointer, (scale, clean_steps, found_inf, outcome, census)),
        )
        return outcome, census
