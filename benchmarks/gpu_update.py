"""All that follows backward on a CUDA device: the guarded update against torch's chain, in one run.

    python benchmarks/gpu_update.py --out results.json

The chain is ``GradScaler.unscale_``, ``clip_grad_norm_``, fused Adam (or SGD) and ``GradScaler.update``; ours is one
call of guard.optim with a scale on the device. Networks of 25 thousand, 1 million and 100 million parameters: time,
launches, host syncs, bandwidth; and a census of 100 million numbers beside torch's own reductions. Adds ``"update"`` to
the results file that ``gpu.py`` wrote, or writes its own. Rounds are interleaved, times those of CUDA events. Exit code
2 where there is no device or no CUDA build, 1 where a result is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu import BROKEN, add_results, arguments, measure, obstacle, summarise
from gpu_step import launches_of, syncs
from torch import Tensor

from mlpkit import guard
from mlpkit._ext import _C
from mlpkit.guard.update import DeviceScale

# Sizes of the parameters: 128-64-64-10 with room, twelve layers of a small transformer, and a large one's.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "25k": [(128, 128), (128,), (64, 128), (64,), (10, 64), (10,)],
    "1M": [(256, 256), (256,)] * 15,
    "100M": [(4096, 4096), (4096,)] * 6,
}
# What the design asks for, beside the measured numbers in the results file: ratios to torch's chain.
BARS = {"25k": 15.0, "1M": 15.0, "100M": 1.5, "launches": 2, "launches_lamb": 3, "syncs": 0}
BYTES = {"sgd": 4 * 6, "adam": 4 * 8}  # an element: gradient twice, parameter and state read and written
KINDS: dict[str, tuple[type, type, dict[str, float]]] = {
    "adam": (guard.optim.Adam, torch.optim.Adam, {}),
    "sgd": (guard.optim.SGD, torch.optim.SGD, {"momentum": 0.9}),
}


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    made = [torch.randn(shape, generator=generator, device="cuda").requires_grad_() for shape in shapes]
    for one in made:
        one.grad = torch.randn(one.shape, generator=generator, device="cuda")
    return made


class Rivals:
    """The same tensors twice, and a step of each way."""

    def __init__(self, shapes: list[tuple[int, ...]], kind: str) -> None:
        ours, theirs, settings = KINDS[kind]
        self.ours, self.theirs = parameters(shapes), parameters(shapes)
        self.optimizer = ours(self.ours, lr=1e-3, clip_norm=1.0, **settings)
        self.plain = theirs(self.theirs, lr=1e-3, fused=True, **settings)
        self.scale = DeviceScale(1.0, device="cuda")
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=1 << 30)
        self.scaler.scale(torch.zeros((), device="cuda"))

    def guarded(self) -> None:
        self.optimizer.step(scale=self.scale)

    def chain(self) -> None:
        self.scaler.unscale_(self.plain)
        torch.nn.utils.clip_grad_norm_(self.theirs, 1.0)
        self.scaler.step(self.plain)
        self.scaler.update()

    def wrong(self) -> str | None:
        """What is wrong after one step of each; None if nothing is."""
        before = [one.detach().clone() for one in self.ours]
        self.guarded()
        self.chain()
        moved = sum(float((a - b).double().square().sum()) for a, b in zip(self.theirs, before)) ** 0.5
        apart = sum(float((a - b).double().square().sum()) for a, b in zip(self.ours, self.theirs)) ** 0.5
        # Written so that NaN is wrong too.
        return None if apart <= BROKEN * 1e-4 * moved else f"steps are {apart:.2e} apart, they moved {moved:.2e}"


def launches_of_lamb() -> int:
    optimizer = guard.optim.LAMB(parameters(SHAPES["25k"]))
    optimizer.step()
    return launches_of(optimizer.step)


def census_calls(elements: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(elements, device="cuda")
    rivals: dict[str, Callable[[], object]] = {
        "mlpkit": lambda: torch.ops.mlpkit.census([x], False),
        "torch": lambda: (x.isnan().sum(), x.isposinf().sum(), x.isneginf().sum(), (x == 0).sum(), x.abs().amax()),
        "sum": x.sum,
    }
    return rivals


def main() -> int:
    options = arguments()
    reason = obstacle()
    if reason is not None:
        print(f"benchmarks/gpu_update.py: {reason}", file=sys.stderr)
        return 2
    _C.force_cuda_kernels("all")
    found: dict[str, Any] = {"bars": BARS, "launches_lamb": launches_of_lamb(), "cases": []}
    broken = False
    for kind in KINDS:
        for size, shapes in SHAPES.items():
            rivals = Rivals(shapes, kind)
            fault = rivals.wrong()
            if fault:
                print(f"WRONG: {kind}, {size}: {fault}", flush=True)
                broken = True
            elements = sum(one.numel() for one in rivals.ours)
            entry = {"name": f"{kind} {size}", "elements": elements, "tensors": len(shapes)}
            entry |= {"launches": launches_of(rivals.guarded), "syncs": syncs(rivals.guarded)}
            entry |= summarise(measure({"mlpkit": rivals.guarded, "torch": rivals.chain}, options.rounds))
            seconds = entry["seconds"]["mlpkit"]["device"]["median"]
            entry["bytes_per_second"] = elements * BYTES[kind] / seconds
            entry["met"] = entry["ratio"]["torch"] >= BARS[size]
            found["cases"].append(entry)
            print(
                f"{entry['name']:>12} {seconds * 1e6:10.1f} us {entry['bytes_per_second'] / 1e12:6.2f} TB/s  "
                f"torch {entry['ratio']['torch']:.2f}x  {entry['launches']} launches",
                flush=True,
            )
            del rivals
    entry = {"name": "census 100M", **summarise(measure(census_calls(100_000_000), options.rounds))}
    found["cases"].append(entry)
    print(f"{entry['name']:>12} " + "  ".join(f"{name} {ratio:.2f}x" for name, ratio in entry["ratio"].items()))
    add_results(options, "update", found)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
