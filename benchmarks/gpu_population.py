"""Hundreds of small MLPs trained at once on a CUDA device against stacked baddbmm and an eager loop, in one run.

    python benchmarks/gpu_population.py --out results.json

512 members 128 -> w -> w -> 10, batch 128, bf16, dropout 0.1, Adam: time of an epoch and steps of members a second, for
w = 64 and others, and for widths mixed among members beside what the uniform runs take. The rival stacks all 512 in
three baddbmm under a captured graph; it draws no batches and shuffles nothing. Adds ``"population"`` to the results
file that ``gpu.py`` wrote, or writes its own. Times are those of CUDA events around whole calls, what the host does
between launches included; rounds are interleaved. Exit code 2 where there is no device or no CUDA build, 1 where a
result is wrong.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu import add_results, arguments, graphed, measure, obstacle, skip, summarise, with_kernels
from torch import Tensor, nn
from torch.nn import functional as F

from mlpkit.population import Member, Population

MEMBERS, ROWS, BATCH, COLUMNS, CLASSES, P = 512, 16384, 128, 128, 10, 0.1
STEPS = ROWS // BATCH
UNIFORM = (64, 16, 32, 128)
MIXED = (16, 32, 64, 128)
EPOCHS = 2**31 - 1
# What the design asks for, beside the measured numbers in the results file.
BARS = {"steps_per_second": 15e6, "best_torch": 5.0, "mixed_over_uniform": 1.15}


def table() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(ROWS, COLUMNS, generator=generator)
    return X, (X @ torch.randn(COLUMNS, CLASSES, generator=generator)).argmax(1)


def members(widths: tuple[int, ...]) -> list[Member]:
    settings: dict[str, Any] = {"dropout": P, "batch_size": BATCH, "epochs": EPOCHS, "precision": "bf16"}
    return [Member(hidden=(widths[i % len(widths)],) * 2, seed=i, **settings) for i in range(MEMBERS)]


class Stacked:
    """All members as one: weights (members, in, out), float32 with bf16 products, Adam's fused step."""

    def __init__(self, width: int, X: Tensor, y: Tensor) -> None:
        torch.manual_seed(0)
        self.shapes = list(itertools.pairwise([COLUMNS, width, width, CLASSES]))
        self.weights = [nn.Parameter(torch.randn(MEMBERS, i, o, device="cuda") / math.sqrt(i)) for i, o in self.shapes]
        self.biases = [nn.Parameter(torch.zeros(MEMBERS, 1, o, device="cuda")) for _, o in self.shapes]
        self.optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=1e-3, fused=True, capturable=True)
        rows = torch.randint(ROWS, (MEMBERS, BATCH))
        self.x, self.y = X[rows].cuda().bfloat16(), y[rows].cuda()

    def step(self) -> None:
        h = self.x
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias.bfloat16(), h, weight.bfloat16())
            if i + 1 < len(self.weights):
                h = F.dropout(F.relu(h), P)
        loss = F.cross_entropy(h.float().flatten(0, 1), self.y.flatten(), reduction="sum") / BATCH
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def eager_loop(X: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of one member by nn.Sequential; its time stands for each of the members in turn."""
    model = nn.Sequential(
        *(nn.Linear(COLUMNS, 64), nn.ReLU(), nn.Dropout(P), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(P)),
        nn.Linear(64, CLASSES),
    ).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    x, target = X[:BATCH].cuda(), y[:BATCH].cuda()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def wrong(population: Population) -> str | None:
    """What is wrong with what was learnt; None if nothing is. Written so that NaN is wrong too."""
    for index, score in population.scores.items():
        if score.skipped or not score.train_loss[-1] < 0.9 * score.train_loss[0]:
            losses = (score.train_loss[0], score.train_loss[-1])
            return f"member {index}: {score.skipped} steps skipped, losses {losses}"
    return None


def main() -> int:
    options = arguments()
    reason = obstacle()
    if reason is not None:
        print(f"benchmarks/gpu_population.py: {reason}", file=sys.stderr)
        return 2
    skipped: list[str] = []
    found: dict[str, Any] = {"bars": BARS, "members": MEMBERS, "batch": BATCH, "cases": [], "skipped": skipped}
    X, y = table()
    epochs: dict[str, float] = {}
    broken = False
    for widths in (*((width,) for width in UNIFORM), MIXED):
        name = "mixed" if len(widths) > 1 else f"w={widths[0]}"
        make = lambda widths=widths: Population(  # noqa: E731
            members(widths), X, y, loss="cross_entropy", device="cuda", progress=False
        )
        holder: list[Population] = []
        with_kernels("all", lambda make=make, holder=holder: holder.append(make()))()
        population = holder[0]
        calls: dict[str, Callable[[], object]] = {
            "mlpkit": with_kernels("all", lambda population=population: population.train(1))
        }
        if name == "w=64":
            stacked = Stacked(64, X, y)
            try:
                calls["stacked, captured"] = graphed(stacked.step)
            except RuntimeError as error:
                skip(skipped, f"stacked baddbmm under a graph: {str(error).splitlines()[0]}")
                calls["stacked"] = stacked.step
            calls["eager loop"] = eager_loop(X, y)
        times = measure(calls, options.rounds)
        # Ours is an epoch, the stack's one step of all, the loop's one step of one.
        for rival in times:
            each = 1.0 if rival == "mlpkit" else STEPS * (MEMBERS if rival == "eager loop" else 1)
            times[rival] = [seconds * each for seconds in times[rival]]
        entry = {"name": name, "widths": widths, **summarise(times)}
        seconds = epochs[name] = entry["seconds"]["mlpkit"]["device"]["median"]
        entry["steps_per_second"] = MEMBERS * STEPS / seconds
        found["cases"].append(entry)
        ratios = "  ".join(f"{rival} {ratio:.2f}x" for rival, ratio in entry["ratio"].items())
        print(
            f"{name:>8} {seconds * 1e3:9.2f} ms an epoch {entry['steps_per_second']:10.3e} steps/s  {ratios}",
            flush=True,
        )
        fault = wrong(population)
        if fault:
            print(f"WRONG: {name}: {fault}", flush=True)
            broken = True
        del calls, population, holder
    found["mixed_over_uniform"] = epochs["mixed"] / (sum(epochs[f"w={w}"] for w in MIXED) / len(MIXED))
    print(f"mixed widths take {found['mixed_over_uniform']:.2f} of the uniform runs' mean", flush=True)
    add_results(options, "population", found)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
