"""The probe behind every floor: how many multiply-adds this machine gives when nothing else is in the way.

It multiplies square matrices that stay in the L2 cache, by the fastest of the products at hand (torch.mm, oneDNN's
linear, mlpkit's own), one single-threaded stream of them a thread. So it is a lower bound of the hardware's peak, and
the shares made of it are upper bounds. For float16, which CPUs multiply as float32, the probe runs in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import torch
from torch import Tensor

from mlpkit.bench.case import DTYPES, Rival, Settings
from mlpkit.functional import linear_act_dropout

SIDES = (256, 384)
# Beside a case each thread makes one product of this side in one call, some 20 ms: short calls would hand Python's lock
# to and fro, and the probe would gain less than the machine gives.
LONG_SIDE = 1024
QUICK_SIDE = 64
CALLS = 4  # products in a row: a millisecond or two


class Stream:
    """Products in a row on one thread's own data."""

    def __init__(self, dtype: torch.dtype, side: int, product: str, calls: int = CALLS) -> None:
        self.x, self.w = (torch.randn(side, side).to(dtype) for _ in range(2))
        self.out = torch.empty(side, side, dtype=dtype)
        self.product = products()[product]
        self.calls = calls
        self.work = calls * 2.0 * side**3

    def __call__(self) -> None:
        """Run them."""
        for _ in range(self.calls):
            self.product(self.x, self.w, self.out)


def products() -> dict[str, Callable[[Tensor, Tensor, Tensor], object]]:
    """The ways to ``x @ w.T`` that this build of torch has."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "torch.mm": lambda x, w, out: torch.mm(x, w.t(), out=out),
        "mlpkit": lambda x, w, out: linear_act_dropout(x, w, activation="identity"),
    }
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # none in builds of torch without oneDNN
    if onednn is not None:
        found["oneDNN"] = lambda x, w, out: onednn(x, w, None, "none", [], "")
    return found


def together(streams: list[Stream]) -> Callable[[], None]:
    """One call that runs every stream once, each on a thread of its own; seconds of it count starting the threads."""

    def work(stream: Stream, start: Barrier) -> None:
        torch.set_num_threads(1)  # holds for this thread: the streams must not share torch's pool
        start.wait()
        stream()

    def run() -> None:
        start = Barrier(len(streams))
        threads = [Thread(target=work, args=(stream, start)) for stream in streams[1:]]
        for thread in threads:
            thread.start()
        work(streams[0], start)
        for thread in threads:
            thread.join()

    return run


def best_stream(dtype: str, settings: Settings) -> tuple[float, dict[str, Any]]:
    """Operations a second of the fastest product on one thread, and which one it was."""
    torch.set_num_threads(1)
    best: tuple[float, dict[str, Any]] = (0.0, {})
    for kind in dict.fromkeys(["fp32", dtype] if dtype != "fp16" else ["fp32"]):
        for side in (QUICK_SIDE,) if settings.quick else SIDES:
            for product in products():
                stream = Stream(DTYPES[kind], side, product)
                rate = stream.work / shortest(stream, settings)
                if rate > best[0]:
                    best = rate, {"product": product, "side": side, "dtype": kind}
    torch.set_num_threads(settings.threads)
    return best


def shortest(call: Callable[[], object], settings: Settings) -> float:
    """Least CPU seconds of a call: on one thread what the neighbours take does not count."""
    call()
    least = float("inf")
    for _ in range(3 if settings.quick else 25):
        begin = time.process_time()
        call()
        least = min(least, time.process_time() - begin)
    return max(least, 1e-9)


class Peaks:
    """The probe's results of one run, each measured when first asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._found: dict[str, dict[str, Any]] = {}

    def of(self, dtype: str) -> dict[str, Any]:
        """``flops_per_second`` of one thread in ``dtype``, and the product that reached it."""
        if dtype not in self._found:
            rate, how = best_stream(dtype, self._settings)
            self._found[dtype] = {"flops_per_second": rate, "threads": 1, **how}
        return self._found[dtype]

    def probe(self, dtype: str, threads: int) -> Rival:
        """As many products at once, by the fastest way, as something to time beside a case."""
        how, side = self.of(dtype), QUICK_SIDE if self._settings.quick else LONG_SIDE
        streams = [Stream(DTYPES[how["dtype"]], side, how["product"], calls=1) for _ in range(threads)]
        return Rival(together(streams), threads=1)

    def to_dict(self) -> dict[str, Any]:
        """All that were asked for, by dtype."""
        return dict(self._found)
