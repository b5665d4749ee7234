"""The wide kernels on a CUDA device of compute capability 9.0 against the bare matrix products and eager, in one run.

    python benchmarks/gpu_wide.py --out results.json

Adds the key ``wide`` to the results of ``benchmarks/gpu.py``. Both schedules of the forward kernel are timed, so that a
device can choose; a layer's share of a network's step is forward, the product that leads to the layer below with its
epilogue, and the weight's gradient. Rounds are interleaved, ratios are medians of the rounds' own. Says so where there
is nothing to measure. Exit code 2 where there is no device, 1 where a result is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu import add_results, arguments, measure, obstacle
from torch import Tensor
from torch.nn import functional as F

from mlpkit import _build_config
from mlpkit._ext import _C
from mlpkit.functional import mlp

SHAPES = [(8192, 4096, 4096), (4096, 1024, 1024)]  # rows, in_features, out_features
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
P = 0.1
# Our time over the rival's: what a case must stay under on an H200 at the first shape with relu.
BARS = {("forward", "products"): 1.05, ("step", "products"): 1.08, ("step", "eager"): 1 / 1.15}
BROKEN = 2e-2  # relative error of a kernel that is wrong; bfloat16 rounds to 2e-3

Calls = dict[str, Callable[[], object]]


def draw(*size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size, device="cuda") * scale).bfloat16()


class Layer:
    """A layer between two others of a network, in the middle of a step."""

    def __init__(self, shape: tuple[int, int, int], activation: str) -> None:
        rows, depth, cols = shape
        self.activation = activation
        self.x, self.weight, self.bias = draw(rows, depth), draw(cols, depth, scale=depth**-0.5), draw(cols)
        self.dz = draw(rows, cols)
        self.seed = torch.tensor([3, 0], device="cuda")
        # The layer below: what it saved, as if its inputs had been these.
        _, self.z_below, self.bits_below, _ = self.forward(draw(rows, cols), draw(depth, cols, scale=cols**-0.5), None)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, p: float = P, pingpong: bool = False) -> Any:
        seed = self.seed if p > 0 else None
        options = (self.activation, 0.01, p, 0, pingpong)
        return torch.ops.mlpkit.linear_act_dropout_wide_forward(x, weight, bias, seed, *options)

    def forwards(self) -> Calls:
        inputs = (self.x, self.weight, self.bias)
        act = ACTIVATIONS[self.activation]
        return {
            "cooperative": lambda: self.forward(*inputs),
            "pingpong": lambda: self.forward(*inputs, pingpong=True),
            "cooperative, p = 0": lambda: self.forward(*inputs, p=0.0),
            "products": lambda: torch.mm(self.x, self.weight.t()),
            "eager": lambda: F.dropout(act(F.linear(*inputs)), P),
        }

    def downs(self) -> Calls:
        saved = (self.z_below, self.bits_below, self.activation, 0.01, P)
        return {
            "cooperative": lambda: torch.ops.mlpkit.linear_act_dropout_wide_backward(self.dz, self.weight, *saved),
            "products": lambda: torch.mm(self.dz, self.weight),
        }

    def error(self) -> float:
        """``||y - exact|| / ||exact||`` of 256 rows without dropout, the worse of both schedules."""
        exact = ACTIVATIONS[self.activation](F.linear(self.x[:256].double(), self.weight.double(), self.bias.double()))
        errors = []
        for pingpong in (False, True):
            y = self.forward(self.x[:256], self.weight, self.bias, p=0.0, pingpong=pingpong)[0]
            errors.append(((y.double() - exact).norm() / exact.norm()).item())
        return max(errors, key=lambda value: (value != value, value))  # NaN is the largest


def steps(shape: tuple[int, int, int], activation: str) -> Calls:
    """Forward and backward of three layers of one width: this library, eager, and their nine products alone."""
    rows, width = shape[0], shape[1]
    x, dy = draw(rows, width), draw(rows, width)
    weights = [draw(width, width, scale=width**-0.5).requires_grad_() for _ in range(3)]
    biases = [draw(width).requires_grad_() for _ in range(3)]
    x.requires_grad_()
    act = ACTIVATIONS[activation]

    def network() -> Tensor:
        return mlp(x, weights, biases, activation=activation, p=P)

    def eager() -> Tensor:
        hidden = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden = F.dropout(act(F.linear(hidden, weight, bias)), P)
        return F.linear(hidden, weights[-1], biases[-1])

    def with_backward(forward: Callable[[], Tensor], kernels: str) -> Callable[[], object]:
        def run() -> object:
            _C.force_cuda_kernels(kernels)
            return torch.autograd.grad(forward(), [x, *weights, *biases], dy)

        return run

    def products() -> None:
        with torch.no_grad():
            for weight in weights:
                torch.mm(x, weight.t())
                torch.mm(dy, weight)
                torch.mm(dy.t(), x)

    return {
        "mlpkit": with_backward(network, "all"),
        "proven": with_backward(network, "proven"),
        "eager": with_backward(eager, "proven"),
        "products": products,
    }


def summarise(seconds: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Medians, and our time over each rival's."""
    return {
        "seconds": {name: {"median": median(values), "minimum": min(values)} for name, values in seconds.items()},
        "ours over": {
            name: median(own / other for own, other in zip(seconds[ours], values, strict=True))
            for name, values in seconds.items()
            if name != ours
        },
    }


def cases(rounds: int) -> tuple[list[dict[str, Any]], bool]:
    found, broken = [], False
    for shape in SHAPES:
        for activation in ACTIVATIONS:
            layer = Layer(shape, activation)
            error = layer.error()
            broken = broken or not error <= BROKEN
            parts = {"forward": (layer.forwards(), "cooperative"), "down": (layer.downs(), "cooperative")}
            if shape[1] == shape[2]:
                parts["step"] = (steps(shape, activation), "mlpkit")
            for part, (calls, ours) in parts.items():
                entry = {"part": part, "shape": shape, "activation": activation, "p": P, "error": error}
                entry |= summarise(measure(calls, rounds), ours)
                if (shape, activation) == (SHAPES[0], "relu"):
                    entry["bars"] = {
                        rival: {"must": bar, "reached": entry["ours over"][rival] <= bar}
                        for (of, rival), bar in BARS.items()
                        if of == part
                    }
                found.append(entry)
                print(line(entry, ours), flush=True)
    return found, broken


def line(entry: dict[str, Any], ours: str) -> str:
    ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in entry["ours over"].items())
    label = f"{entry['part']:>7} {entry['activation']} {entry['shape']}"
    return f"{label}: {entry['seconds'][ours]['median'] * 1e6:.1f} us; over {ratios}; error {entry['error']:.1e}"


def main() -> int:
    options = arguments()
    reason = obstacle()
    if reason is not None:
        print(f"benchmarks/gpu_wide.py: {reason}", file=sys.stderr)
        return 2
    if _build_config.CUDA_WIDE_MISSING or torch.cuda.get_device_capability() != (9, 0):
        why = _build_config.CUDA_WIDE_MISSING or "they run on compute capability 9.0"
        print(f"skipped: kernels for wide layers: {why}", flush=True)
        return 0
    found, broken = cases(options.rounds)
    add_results(options, "wide", {"cutlass": _build_config.CUTLASS, "rounds": options.rounds, "cases": found})
    if broken:
        print("WRONG: a wide kernel's error is larger than bfloat16 explains", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
