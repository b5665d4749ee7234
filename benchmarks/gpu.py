"""linear_act_dropout on a CUDA device against eager PyTorch, torch.compile and the bare matrix products, in one run.

    python benchmarks/gpu.py --out results.json

Prints one line a case and writes JSON. Rounds are interleaved (each rival once a round), times are those of CUDA events
around enough calls to fill 10 ms, so that a small case shows what launching costs; ratios are medians of the rounds'
own ratios. ``mlpkit`` takes all CUDA kernels, ``proven`` only those that earlier results stand for. Cases with a bar
are held against it, and the verdict is printed and written. Says what it skips and why; stays within ``--budget``
seconds.
Exit code 2 where there is no device or no CUDA build, 1 where the results are wrong (a missed bar is a fact, no error).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import gpu_rivals
import torch
from torch import Tensor
from torch.nn import functional as F

import mlpkit
from mlpkit import _build_config
from mlpkit._ext import _C
from mlpkit.functional import linear_act_dropout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
SHAPES = [(8192, 128, 4096), (8192, 4096, 4096), (1024, 128, 256)]
# What a case must reach on an H200: ratios to rivals, and the share of the copy bandwidth that its fewest bytes make of
# its time. Its thin shape alone has them.
BARS = {"eager": 4.0, "compile": 2.2}
BARS_COPY_SHARE = 0.75
SECONDS_A_SAMPLE = 0.01
SECONDS_A_COMPILATION = 60.0  # of both modes
COPY_BYTES = 1 << 30
# How much worse than eager's the error against float64 may be before the numbers are not worth publishing. The rule for
# precision is in tests/closeness.py; this only notices a broken kernel.
BROKEN = 10.0


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]  # rows, in_features, out_features
    dtype: str
    activation: str
    backward: bool
    p: float

    def facts(self) -> dict[str, Any]:
        return {
            "pass": "fwd+bwd" if self.backward else "fwd",
            "dtype": self.dtype,
            "shape": self.shape,
            "activation": self.activation,
            "p": self.p,
        }

    def fewest_bytes(self) -> int:
        """Each tensor once: x, weight, bias, y and what is saved; backward dy, those again and the gradients."""
        rows, depth, cols = self.shape
        size = DTYPES[self.dtype].itemsize
        operands, outputs = (rows * depth + cols * depth + cols) * size, rows * cols * size
        bits = rows * cols // 8 if self.p > 0 or self.activation == "relu" else 0
        saved = bits + (outputs if self.activation != "relu" else 0) if self.backward else 0
        forward = operands + outputs + saved
        return forward + (outputs + saved + 2 * operands if self.backward else 0)


def cases() -> list[Case]:
    """Most important first, so that a short budget leaves out the rest."""
    found = [Case(shape, "bf16", "relu", backward, 0.1) for shape in SHAPES for backward in (False, True)]
    found += [Case(SHAPES[0], "bf16", "gelu", backward, 0.1) for backward in (False, True)]
    found += [Case(shape, "fp32", "relu", backward, 0.1) for shape in SHAPES for backward in (False, True)]
    return [*found, Case(SHAPES[0], "bf16", "relu", False, 0.0), Case(SHAPES[0], "bf16", "relu", True, 0.0)]


class Problem:
    """One case's data and the calls that are timed."""

    def __init__(self, case: Case) -> None:
        rows, depth, cols = case.shape
        self.case = case
        generator = torch.Generator(device="cuda").manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=generator, device="cuda") * scale
            return values.to(DTYPES[case.dtype])

        self.x = draw(rows, depth).requires_grad_(case.backward)
        self.weight = draw(cols, depth, scale=depth**-0.5).requires_grad_(case.backward)
        self.bias = draw(cols).requires_grad_(case.backward)
        self.dy = draw(rows, cols)

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_act_dropout(x, weight, bias, activation=self.case.activation, p=self.case.p)

    def eager(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.dropout(ACTIVATIONS[self.case.activation](F.linear(x, weight, bias)), self.case.p)

    def step(self, layer: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> None:
            y = layer(self.x, self.weight, self.bias)
            if self.case.backward:
                y.backward(self.dy)
                self.x.grad = self.weight.grad = self.bias.grad = None

        return run

    def products(self) -> None:
        with torch.no_grad():
            torch.mm(self.x, self.weight.t())
            if self.case.backward:
                torch.mm(self.dy, self.weight)
                torch.mm(self.dy.t(), self.x)

    def errors(self) -> dict[str, float]:
        """``||t - exact|| / ||exact||`` without dropout, on the first 256 rows, the largest of y and the gradients.

        mlpkit with all kernels, proven ones alone, and eager.
        """
        activation = ACTIVATIONS[self.case.activation]

        def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return activation(F.linear(x, weight, bias))

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear_act_dropout(x, weight, bias, activation=self.case.activation)

        def results(layer: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
            inputs = [t.detach()[:256] if t is self.x else t.detach() for t in (self.x, self.weight, self.bias)]
            inputs = [t.to(dtype).requires_grad_() for t in inputs]
            y = layer(*inputs)
            gradients = torch.autograd.grad(y, inputs, self.dy[:256].to(dtype)) if self.case.backward else ()
            return [y.detach(), *gradients]

        exact = results(stock, torch.float64)

        def error(found: list[Tensor]) -> float:
            errors = [((t.double() - e).norm() / e.norm()).item() for t, e in zip(found, exact, strict=True)]
            return max(errors, key=lambda value: (value != value, value))  # NaN is the largest

        dtype = DTYPES[self.case.dtype]
        found = {"eager": error(results(stock, dtype))}
        for name, kernels in (("mlpkit", "all"), ("proven", "proven")):
            _C.force_cuda_kernels(kernels)
            found[name] = error(results(ours, dtype))
        return found


def with_kernels(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with ``MLPKIT_CUDA_KERNELS`` set to that name, whatever was chosen before."""

    def run() -> None:
        _C.force_cuda_kernels(name)
        call()

    return run


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call captured in a CUDA graph, after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rivals(problem: Problem, compiles: bool, skipped: list[str]) -> dict[str, Callable[[], object]]:
    ours, eager = problem.step(problem.fused), problem.step(problem.eager)
    calls = {
        "mlpkit": with_kernels("all", ours),
        "proven": with_kernels("proven", ours),
        "eager": eager,
        "mm": problem.products,
    }
    _C.force_cuda_kernels("all")
    for name, call in (("mlpkit graph", ours), ("eager graph", eager)):
        try:
            calls[name] = graphed(call)
        except RuntimeError as error:
            skip(skipped, f"{name} on {problem.case.facts()}: {str(error).splitlines()[0]}")
    modes = {"compile": None, "compile max-autotune": "max-autotune"} if compiles else {}
    for name, mode in modes.items():
        torch.compiler.reset()
        compiled = problem.step(torch.compile(problem.eager, fullgraph=True, mode=mode))
        try:
            compiled()
        except RuntimeError as error:  # what inductor raises without a C++ compiler, Triton or a device it knows
            skip(skipped, f"{name} on {problem.case.facts()}: {str(error).splitlines()[0]}")
        else:
            calls[name] = compiled
    return calls | fused_rivals(problem, skipped)


def fused_rivals(problem: Problem, skipped: list[str]) -> dict[str, Callable[[], object]]:
    """Linear by each installed library, activation and dropout by PyTorch."""
    calls: dict[str, Callable[[], object]] = {}
    case = problem.case
    _, depth, cols = case.shape

    def build(name: str) -> None:
        linear = gpu_rivals.LAYERS[name](depth, cols, DTYPES[case.dtype])
        step = problem.step(lambda x, _, __: F.dropout(ACTIVATIONS[case.activation](linear(x)), case.p))

        def call() -> None:
            step()
            linear.zero_grad(set_to_none=True)

        call()
        calls[name] = call

    for name in gpu_rivals.LAYERS:
        gpu_rivals.tried(name, lambda name=name: build(name), lambda why: skip(skipped, f"{why} ({case.facts()})"))
    return calls


def bars(case: Case, entry: dict[str, Any], copy_bandwidth: float) -> dict[str, dict[str, Any]]:
    """Name of each bar of the case: wanted, found, and whether it is met."""
    if case.shape != SHAPES[0] or case.dtype != "bf16" or case.p == 0:
        return {}
    share = case.fewest_bytes() / copy_bandwidth / entry["seconds"]["mlpkit"]["device"]["median"]
    found = {"of the copy bandwidth": (BARS_COPY_SHARE, share)}
    for rival, wanted in BARS.items():
        ratios = [ratio for name, ratio in entry["ratio"].items() if name.split(" max")[0] == rival]
        if ratios:
            found[f"over {rival}"] = (wanted, min(ratios))
    return {name: {"wanted": wanted, "found": value, "met": value >= wanted} for name, (wanted, value) in found.items()}


def skip(skipped: list[str], what: str) -> None:
    skipped.append(what)
    print(f"skipped: {what}", flush=True)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Device seconds of one call, over ``repeats`` calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    repeats = {}
    for name, call in calls.items():
        seconds_of(call, 3)  # loads kernels, allocates, warms the caches and the clocks
        repeats[name] = max(1, min(2000, round(SECONDS_A_SAMPLE / seconds_of(call, 3))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, repeats[name]))
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median and minimum of each rival, and the medians of the per-round ratios to our op."""
    ours = seconds["mlpkit"]
    return {
        "seconds": {
            name: {"device": {"median": median(values), "minimum": min(values)}} for name, values in seconds.items()
        },
        "ratio": {
            name: median(other / own for other, own in zip(values, ours, strict=True))
            for name, values in seconds.items()
            if name != "mlpkit"
        },
    }


def line(case: dict[str, Any]) -> str:
    times = case["seconds"]["mlpkit"]["device"]
    ratios = "  ".join(f"{name} {ratio:5.2f}x" for name, ratio in case["ratio"].items())
    label = f"{case['pass']:>7} {case['dtype']} {case['activation']} p={case['p']} {case['shape']!s:>18}"
    return f"{label} {times['median'] * 1e6:10.1f} us (minimum {times['minimum'] * 1e6:.1f})   {ratios}"


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a large copy on the device: the ceiling of every kernel here."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    seconds_of(lambda: target.copy_(source), 3)
    return 2 * COPY_BYTES / median(seconds_of(lambda: target.copy_(source), 5) for _ in range(5))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "mlpkit": mlpkit.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": _build_config.CUDA_COMPILER,
        "architectures": _build_config.CUDA_ARCHITECTURES,
        "python": platform.python_version(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "copy_bytes_per_second": copy_bandwidth(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "rounds": options.rounds,
        "caches": "warm",
    }


def obstacle() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; run it on a machine with one"
    if not _build_config.CUDA:
        return "this mlpkit was built without CUDA; install it again where nvcc and a CUDA torch are found"
    return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=9, help="at least 7")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds after which the rest is skipped")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    if options.rounds < 7:
        parser.error(f"--rounds is {options.rounds}, it must be at least 7")
    return options


def add_results(options: argparse.Namespace, key: str, found: dict[str, Any]) -> None:
    """Put ``found`` into the results file, beside what another benchmark of the run wrote; whole or not at all."""
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"environment": environment(options)}
    part = options.out.with_suffix(".part")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps({**kept, key: found}, indent=1) + "\n")
    part.replace(options.out)


def main() -> int:
    options = arguments()
    reason = obstacle()
    if reason is not None:
        print(f"benchmarks/gpu.py: {reason}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    facts = environment(options)
    report: dict[str, Any] = {"environment": facts, "cases": [], "skipped": []}
    bandwidth = facts["copy_bytes_per_second"] / 1e12
    print(f"{facts['device']}, torch {facts['torch']}, copy {bandwidth:.2f} TB/s; ratios: their time over ours")
    broken = False
    for case in cases():
        left = options.budget - (time.monotonic() - begin)
        if left <= 0:
            skip(report["skipped"], f"{case.facts()}: the budget of {options.budget:.0f} s is used up")
            continue
        compiles = not options.no_compile and left > SECONDS_A_COMPILATION
        if not compiles:
            why = "left out by --no-compile" if options.no_compile else f"{left:.0f} s left of the budget"
            skip(report["skipped"], f"torch.compile on {case.facts()}: {why}")
        problem = Problem(case)
        errors = problem.errors()
        for name in ("mlpkit", "proven"):
            if not errors[name] <= BROKEN * max(errors["eager"], 1e-7):  # written so that NaN is wrong too
                print(f"WRONG: {case.facts()}: {name} errs by {errors[name]:.2e}, eager by {errors['eager']:.2e}")
                broken = True
        entry = {**case.facts(), "error": errors}
        entry |= summarise(measure(rivals(problem, compiles, report["skipped"]), options.rounds))
        entry["bars"] = bars(case, entry, facts["copy_bytes_per_second"])
        report["cases"].append(entry)
        print(line(entry), flush=True)
        for name, bar in entry["bars"].items():
            verdict = "met" if bar["met"] else "MISSED"
            print(f"        {verdict}: {bar['found']:.2f} {name}, {bar['wanted']:.2f} wanted", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(options.out)
    print(f"wrote {options.out} after {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
