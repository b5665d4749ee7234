"""Whole small networks on a CUDA device against eager PyTorch, torch.compile and a captured graph, in one run.

    python benchmarks/gpu_step.py --out results.json

Inference and training of five layers of width 64 over 2^21 rows, and the step of 128-64-64-10 with dropout and Adam
over 4096: time, samples a second, launches and, for the step, host syncs. Adds ``"small_networks"`` to the results
file that ``gpu.py`` wrote, or writes its own. Times are those of CUDA events; rounds are interleaved. Exit code 2 where
there is no device or no CUDA build, 1 where a result is wrong.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import gpu_rivals
import torch
from gpu import BROKEN, add_results, arguments, graphed, measure, obstacle, skip, summarise
from torch import Tensor, nn
from torch.nn import functional as F

STREAM_WIDTHS, STREAM_ROWS = [64, 64, 64, 64, 64, 16], 1 << 21
STEP_WIDTHS, STEP_ROWS, STEP_P = [128, 64, 64, 10], 4096, 0.1
# What the design asks for, beside the measured numbers in the results file.
BARS = {"inference": 6e9, "training": 1.8e9, "step_seconds": 20e-6, "step_launches": 3, "step_syncs": 0}


class Network:
    """Weights on the device, and the calls that are timed."""

    def __init__(self, widths: list[int], rows: int, p: float, classes: bool) -> None:
        torch.manual_seed(0)
        self.p, self.classes = p, classes
        self.layers = nn.ModuleList(nn.Linear(i, o, device="cuda") for i, o in itertools.pairwise(widths))
        self.x = torch.randn(rows, widths[0], device="cuda")
        shape = (rows,) if classes else (rows, widths[-1])
        self.target = (
            torch.randint(0, widths[-1], shape, device="cuda") if classes else torch.randn(shape, device="cuda")
        )
        self.parameters = list(self.layers.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, fused=True, capturable=True)
        self.first, self.second = ([torch.zeros_like(one) for one in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device="cuda") for _ in self.parameters]
        self.seed = torch.tensor([7, 0], device="cuda")
        self.half_x = self.x.bfloat16()

    def infer(self) -> Tensor:
        raw = [one.detach() for one in self.parameters]
        rates = [0.0] * (len(self.layers) - 1)
        y: Tensor = torch.ops.mlpkit.mlp_step_forward(
            self.half_x, raw, [True] * len(self.layers), None, "relu", 0.01, rates, False
        )
        return y

    def step(self) -> Tensor:
        outcome: Tensor = torch.ops.mlpkit.mlp_step(
            *(self.x, self.target, [one.detach() for one in self.parameters], [True] * len(self.layers)),
            *(self.first, self.second, self.steps, self.seed, []),
            *("relu", 0.01, [self.p] * (len(self.layers) - 1), False),
            *(0 if self.classes else 2, True, 1.0, 0.0, -100, None),
            *("adam", [1e-3, 0.0, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0], [0] * len(self.parameters), [], 0.0, []),
        )[0]
        return outcome

    def eager(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x)), self.p)
        return self.layers[-1](x)

    def eager_infer(self) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            x = self.half_x
            for layer in self.layers[:-1]:
                x = F.relu(layer(x))
            return self.layers[-1](x)

    def loss(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            y = self.eager(x).float()
        return F.cross_entropy(y, self.target) if self.classes else F.mse_loss(y, self.target)

    def eager_step(self, loss: Callable[[Tensor], Tensor] | None = None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (loss or self.loss)(self.x).backward()
        self.optimizer.step()


def launches_of(call: Callable[[], object]) -> int:
    """Kernels that one call puts on the device."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def syncs(call: Callable[[], object]) -> bool:
    """Whether a call waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def wrong(network: Network) -> str | None:
    """What is wrong with our outputs, next to eager's; None if nothing is."""
    with torch.no_grad():
        x = network.half_x[:512].double()
        for layer in network.layers[:-1]:
            x = F.relu(F.linear(x, layer.weight.double(), layer.bias.double()))
        exact = F.linear(x, network.layers[-1].weight.double(), network.layers[-1].bias.double())
        ours, eager = ((y[:512].double() - exact).norm() for y in (network.infer(), network.eager_infer()))
    # Written so that NaN is wrong too.
    return None if ours <= BROKEN * eager else f"error {ours.item():.2e}, eager's is {eager.item():.2e}"


def compiled(network: Network, skipped: list[str]) -> Callable[[], object] | None:
    torch.compiler.reset()
    loss = torch.compile(network.loss, mode="max-autotune-no-cudagraphs")
    try:
        network.eager_step(loss)
    except RuntimeError as error:
        skip(skipped, f"torch.compile of the step: {str(error).splitlines()[0]}")
        return None
    return lambda: network.eager_step(loss)


def fused_rivals(network: Network, skipped: list[str]) -> tuple[dict[str, Callable[[], object]], ...]:
    """Inference and training step of the same widths by each installed library."""
    inferences: dict[str, Callable[[], object]] = {}
    steps: dict[str, Callable[[], object]] = {}

    def build(name: str) -> None:
        rival = gpu_rivals.NETWORKS[name](STREAM_WIDTHS)
        optimizer = torch.optim.Adam(rival.parameters(), lr=1e-3, fused=True, capturable=True)

        def infer() -> object:
            with torch.no_grad():
                return rival(network.half_x)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(rival(network.x).float(), network.target).backward()
            optimizer.step()

        infer(), step()
        inferences[name], steps[name] = infer, step

    for name in gpu_rivals.NETWORKS:
        gpu_rivals.tried(name, lambda name=name: build(name), lambda why: skip(skipped, why))
    return inferences, steps


def main() -> int:
    options = arguments()
    reason = obstacle()
    if reason is not None:
        print(f"benchmarks/gpu_step.py: {reason}", file=sys.stderr)
        return 2
    skipped: list[str] = []
    found: dict[str, Any] = {"bars": BARS, "cases": [], "skipped": skipped}
    broken = False

    def add(name: str, calls: dict[str, Callable[[], object]], rows: int, **facts: Any) -> None:
        entry = {"name": name, "rows": rows, **facts, **summarise(measure(calls, options.rounds))}
        seconds = entry["seconds"]["mlpkit"]["device"]["median"]
        entry["samples_per_second"] = rows / seconds
        found["cases"].append(entry)
        ratios = "  ".join(f"{rival} {ratio:.2f}x" for rival, ratio in entry["ratio"].items())
        print(f"{name:>22} {seconds * 1e6:10.1f} us {rows / seconds:10.3e} samples/s  {ratios}", flush=True)

    wide = Network(STREAM_WIDTHS, STREAM_ROWS, 0.0, classes=False)
    for network in (wide, Network(STEP_WIDTHS, STEP_ROWS, STEP_P, classes=True)):
        fault = wrong(network)
        if fault:
            print(f"WRONG: {[layer.weight.shape for layer in network.layers]}: {fault}", flush=True)
            broken = True
    infer, train = fused_rivals(wide, skipped)
    add("inference", {"mlpkit": wide.infer, "eager": wide.eager_infer, **infer}, STREAM_ROWS, widths=STREAM_WIDTHS)
    add("training", {"mlpkit": wide.step, "eager": wide.eager_step, **train}, STREAM_ROWS, widths=STREAM_WIDTHS)
    del wide
    small = Network(STEP_WIDTHS, STEP_ROWS, STEP_P, classes=True)
    calls: dict[str, Callable[[], object]] = {"mlpkit": small.step, "eager": small.eager_step}
    fast = None if options.no_compile else compiled(small, skipped)
    if fast:
        calls["compile"] = fast
    facts = {"widths": STEP_WIDTHS, "launches": launches_of(small.step), "syncs": syncs(small.step)}
    add("step", calls, STEP_ROWS, **facts)
    graphs = {name: graphed(call) for name, call in calls.items()}
    add("step, captured", graphs, STEP_ROWS, **facts)
    add_results(options, "small_networks", found)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
