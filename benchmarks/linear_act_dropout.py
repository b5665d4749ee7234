"""linear_act_dropout on the CPU against eager PyTorch, torch.compile and the bare matrix products, in one run.

    python benchmarks/linear_act_dropout.py --out results.json --threads 1 --compile

Prints one line a case and writes JSON. Rounds are interleaved (each rival once a round) and ratios are medians of the
rounds' own ratios, of process CPU time: on a shared machine wall time says as much about the neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mlpkit
from mlpkit._ext import _C
from mlpkit.functional import linear_act_dropout

SHAPES = [(1024, 128, 256), (1024, 128, 4096), (512, 1024, 1024), (32, 128, 64)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
SECONDS_A_ROUND = 0.02


def rivals(
    shape: tuple[int, int, int], dtype: torch.dtype, backward: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """One call of each rival on the same data, by name."""
    rows, inner, cols = shape
    torch.manual_seed(0)
    x = torch.randn(rows, inner).to(dtype).requires_grad_(backward)
    weight = (torch.randn(cols, inner) / inner**0.5).to(dtype).requires_grad_(backward)
    bias = torch.randn(cols).to(dtype).requires_grad_(backward)
    dy = torch.randn(rows, cols).to(dtype)
    act = ACTIVATIONS[options.activation]

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.dropout(act(F.linear(x, weight, bias)), options.p)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_act_dropout(x, weight, bias, activation=options.activation, p=options.p)

    def step(layer: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            y = layer(x, weight, bias)
            if backward:
                y.backward(dy)
                x.grad = weight.grad = bias.grad = None

        return run

    def products() -> None:
        with torch.no_grad():
            torch.mm(x, weight.t())
            if backward:
                torch.mm(dy, weight)
                torch.mm(dy.t(), x)

    found = {"mlpkit": step(fused), "eager": step(eager), "mm": products}
    if options.compile:
        found["compile"] = step(torch.compile(eager, fullgraph=True))
    return found


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds a call (wall and process CPU time) of every rival, for each round."""
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, allocates, warms the caches
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, min(1000, round(SECONDS_A_ROUND / (time.perf_counter() - begin))))
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            seconds[name].append({clock: value / repeats[name] for clock, value in spent.items()})
    return seconds


def summarise(seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Median and minimum of each rival, and the medians of the per-round ratios to our op."""
    summary: dict[str, Any] = {"seconds": {}, "ratio": {}}
    for name, rounds in seconds.items():
        for clock in ("wall", "cpu"):
            values = [spent[clock] for spent in rounds]
            summary["seconds"].setdefault(name, {})[clock] = {"median": median(values), "minimum": min(values)}
        if name != "mlpkit":
            pairs = zip(rounds, seconds["mlpkit"], strict=True)
            summary["ratio"][name] = median(other["cpu"] / max(ours["cpu"], 1e-9) for other, ours in pairs)
    return summary


def line(case: dict[str, Any]) -> str:
    seconds = case["seconds"]["mlpkit"]
    times = f"{seconds['cpu']['median'] * 1e6:10.1f} us cpu {seconds['wall']['median'] * 1e6:10.1f} us wall"
    ratios = "  ".join(f"{name} {ratio:5.2f}x" for name, ratio in case["ratio"].items())
    return f"{case['pass']:>7} {case['dtype']} {case['shape']!s:>18} {times}   {ratios}"


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    cpu = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "mlpkit": mlpkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "cpu_capability": _C.cpu_capability(),
        "gemm_library": _C.gemm_library(),
        "threads": options.threads,
        "rounds": options.rounds,
        "activation": options.activation,
        "p": options.p,
        "caches": "warm",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="at least 7")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu")
    parser.add_argument("--p", type=float, default=0.1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="torch.compile as a rival too (minutes of compile time)")
    options = parser.parse_args()
    if options.rounds < 7:
        parser.error(f"--rounds is {options.rounds}, it must be at least 7")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"environment": environment(options), "cases": []}
    facts = report["environment"]
    print(
        f"{facts['cpu']}, {facts['cpu_capability']}, {options.threads} thread(s), torch {facts['torch']}, "
        f"{options.activation}, p = {options.p}; ratios: CPU time over ours, median of {options.rounds} rounds"
    )
    for dtype in options.dtypes:
        for shape in SHAPES:
            for backward in (False, True):
                torch.compiler.reset()
                calls = rivals(shape, DTYPES[dtype], backward, options)
                case = {"pass": "fwd+bwd" if backward else "fwd", "dtype": dtype, "shape": shape}
                case |= summarise(measure(calls, options.rounds))
                report["cases"].append(case)
                print(line(case), flush=True)
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(options.out)
    print(f"wrote {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
