"""Products of float32 by two numbers of tf32 each against cuBLAS's in float32 and in tf32, in one run.

    python benchmarks/gpu_split.py --out results.json

Adds the key ``split`` to the results of ``benchmarks/gpu.py``. Each shape is timed in the three forms that a layer has:
``x W^T``, ``dz W`` and ``dz^T x``. Errors are RMS against fp64. Rounds are interleaved, ratios are medians of the
rounds' own. Exit code 2 where there is no device, 1 where a result is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu import add_results, arguments, measure, obstacle
from gpu_wide import summarise
from torch import Tensor

SHAPES = [(4096, 4096, 4096), (8192, 1024, 1024)]  # rows, depth, cols
# Our time over SGEMM's and our error over its error, at the first shape on an H200.
TIME_BAR, ERROR_BAR = 1 / 1.2, 1.5
FORMS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "x W^T": lambda a, b: (a, b.t().contiguous().t()),
    "dz W": lambda a, b: (a, b),
    "dz^T x": lambda a, b: (a.t().contiguous().t(), b),
}


def rms_error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).square().mean().sqrt().item()


def by_torch(a: Tensor, b: Tensor, *, tf32: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return a @ b

    return run


def case(shape: tuple[int, int, int], form: str, rounds: int) -> dict[str, Any]:
    rows, depth, cols = shape
    a, b = FORMS[form](torch.randn(rows, depth, device="cuda"), torch.randn(depth, cols, device="cuda"))
    calls: dict[str, Callable[[], Tensor]] = {
        "3xtf32": lambda: torch.ops.mlpkit.split_product(a, b),
        "fp32": by_torch(a, b, tf32=False),
        "tf32": by_torch(a, b, tf32=True),
    }
    exact = a.double() @ b.double()
    errors = {name: rms_error(call(), exact) for name, call in calls.items()}
    entry: dict[str, Any] = {
        "form": form,
        "shape": shape,
        "error": errors,
        "error over fp32": errors["3xtf32"] / errors["fp32"],
    }
    entry |= summarise(measure(dict(calls), rounds), "3xtf32")
    entry["tflops"] = 2e-12 * rows * cols * depth / entry["seconds"]["3xtf32"]["median"]
    if shape == SHAPES[0]:
        time = entry["ours over"]["fp32"]
        entry["bars"] = {
            "time over fp32": {"must": TIME_BAR, "reached": time <= TIME_BAR},
            "error over fp32": {"must": ERROR_BAR, "reached": entry["error over fp32"] <= ERROR_BAR},
        }
    return entry


def main() -> int:
    options = arguments()
    reason = obstacle()
    if reason is not None:
        print(f"benchmarks/gpu_split.py: {reason}", file=sys.stderr)
        return 2
    if torch.cuda.get_device_capability() < (8, 0):
        print("skipped: products by tf32 run on compute capability 8.0 and newer", flush=True)
        return 0
    before = torch.backends.cuda.matmul.allow_tf32
    found = []
    for shape in SHAPES:
        for form in FORMS:
            entry = case(shape, form, options.rounds)
            found.append(entry)
            ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in entry["ours over"].items())
            print(
                f"{form:>7} {shape}: {entry['tflops']:.1f} TFLOP/s; over {ratios}; error over fp32's "
                f"{entry['error over fp32']:.2f}",
                flush=True,
            )
    torch.backends.cuda.matmul.allow_tf32 = before
    add_results(options, "split", {"rounds": options.rounds, "cases": found})
    broken = [entry for entry in found if not entry["error over fp32"] <= 2 * ERROR_BAR]
    if broken:
        print("WRONG: the product's error is larger than a lost bit explains", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
