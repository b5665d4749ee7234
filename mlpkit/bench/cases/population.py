"""Many MLPs trained at once, beside stacked products, vmap, loops over PyTorch and scikit-learn."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit import nn
from mlpkit.bench.case import OURS, Case, Rival, Settings, Times
from mlpkit.bench.cases._network import IN, LEARNING_RATE, OUT, Network, P
from mlpkit.bench.cases._stacked import Stacked
from mlpkit.bench.cases.threads import ONE, PROBE, PROBE_ONE
from mlpkit.bench.peak import Peaks

MEMBERS = 256
MIXED = (16, 32, 64, 128, 256)
DIGITS = ((), (16,), (64,), (128,), (32, 32), (128, 64))  # depths 0 to 2, widths 16 to 128
DIGITS_BATCH, DIGITS_EPOCHS, DIGITS_RATE = 64, 30, 1e-3


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """Populations of 256 MLPs against stacked torch and loops; mixed widths; two threads; fits of digits."""
    if "fp32" not in settings.dtypes:
        return []
    count, batches, widths = (3, (8,), (8,)) if settings.quick else (MEMBERS, (32, 256), (16, 64, 256))
    found = [Group(batch, (width,) * count).case(settings) for batch in batches for width in widths]
    if not settings.quick:
        found.append(Group(32, (32,) * count).case(settings))
    mixed = (4, 8) if settings.quick else MIXED
    found.append(Group(batches[0], tuple(mixed[i % len(mixed)] for i in range(count))).case(settings))
    if (os.cpu_count() or 1) > 1:
        found.append(_threads(Group(batches[0], (widths[-1],) * count if settings.quick else (64,) * count), peaks))
    if find_spec("sklearn") is not None:
        found.append(_digits(settings))
    return found


@dataclass(frozen=True)
class Group:
    """Members 128 -> w -> w -> 10 with these widths, dropout and Adam, all for the same number of steps."""

    batch: int
    widths: tuple[int, ...]

    @property
    def mixed(self) -> bool:
        """Whether widths differ."""
        return len(set(self.widths)) > 1

    @property
    def steps(self) -> int:
        """Steps of an epoch: as many as the loops, which take seconds a round, leave time for."""
        return max(2, 512 // self.batch)

    @property
    def work(self) -> float:
        """Operations of the products of all steps."""
        return self.steps * sum(Network.of_width(self.batch, width).work for width in self.widths)

    def data(self) -> tuple[Tensor, Tensor]:
        """One epoch of every member."""
        generator = torch.Generator().manual_seed(1)
        rows = self.steps * self.batch
        return torch.randn(rows, IN, generator=generator), torch.randint(OUT, (rows,), generator=generator)

    def case(self, settings: Settings) -> Case:
        """The row: one call is an epoch of every member."""
        width = (
            "mixed widths " + ", ".join(map(str, sorted(set(self.widths)))) if self.mixed else f"w = {self.widths[0]}"
        )
        return Case(
            family="population",
            label=f"{len(self.widths)} x ({IN} -> w -> w -> {OUT}), {width}, batch {self.batch}",
            sizes={"members": len(self.widths), "rows": self.batch, "width": max(self.widths), "steps": self.steps},
            what="training",
            dtype="fp32",
            work=self.work,
            build=lambda: self.rivals(settings),
            baseline="stacked",
            derive=self.per_step,
        )

    def per_step(self, times: Times) -> dict[str, float]:
        """CPU microseconds of one step of one member."""
        least = min(spent["cpu"] for spent in times[OURS])
        return {"microseconds_a_step": 1e6 * least / (self.steps * len(self.widths))}

    def ours(self, p: float = P) -> Callable[[], object]:
        """An epoch of the population."""
        from mlpkit.population import Member, Population

        settings: dict[str, Any] = {"lr": LEARNING_RATE, "batch_size": self.batch, "epochs": 2**30, "dropout": p}
        members = [Member(hidden=(width, width), seed=seed, **settings) for seed, width in enumerate(self.widths)]
        population = Population(members, *self.data(), loss="cross_entropy", out_features=OUT, progress=False)
        return lambda: population.train(1)

    def rivals(self, settings: Settings) -> dict[str, Rival]:
        """All that can train these members here."""
        x, y = self.data()
        members, width = len(self.widths), max(self.widths)
        found = {OURS: Rival(self.ours()), "stacked": Rival(Stacked(members, width).epoch(x, y, self.batch))}
        if settings.compile:
            torch.compiler.reset()
            compiled = Stacked(members, width).epoch(x, y, self.batch, compiles=True)
            found["stacked, compiled"] = Rival(compiled)
        if self.mixed:
            return found
        found["vmap"] = Rival(Stacked(members, width).by_vmap(x, y, self.batch))
        found["eager loop"] = Rival(self.eager(x, y))
        if find_spec("sklearn") is not None and self.batch == 32:
            found["sklearn without dropout"] = Rival(self.sklearn(x, y, settings.threads))
        return found

    def eager(self, x: Tensor, y: Tensor) -> Callable[[], object]:
        """One model after the other."""
        torch.manual_seed(0)
        models = [nn.MLP(IN, (width, width), OUT, dropout=P).to_sequential() for width in self.widths]
        optimizers = [torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True) for model in models]
        batches = torch.split(torch.randperm(len(x)), self.batch)

        def run() -> None:
            for model, optimizer in zip(models, optimizers, strict=True):
                for rows in batches:
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()

        return run

    def sklearn(self, x: Tensor, y: Tensor, threads: int) -> Callable[[], object]:
        """``partial_fit`` of one model after the other."""
        from sklearn.neural_network import MLPClassifier
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=threads, user_api="blas")
        arrays = [
            (a.numpy(), b.numpy()) for a, b in zip(torch.split(x, self.batch), torch.split(y, self.batch), strict=True)
        ]
        models = [
            MLPClassifier((w, w), learning_rate_init=LEARNING_RATE, alpha=0.0, batch_size=self.batch, random_state=0)
            for w in self.widths
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a batch may lack a class
            for model in models:
                model.partial_fit(*arrays[0], classes=range(OUT))

        def run() -> None:
            for model in models:
                for rows, classes in arrays:
                    model.partial_fit(rows, classes)

        return run


def _threads(group: Group, peaks: Peaks) -> Case:
    def build() -> dict[str, Rival]:
        run = group.ours()
        return {
            OURS: Rival(run, threads=2),
            ONE: Rival(run, threads=1),
            PROBE: peaks.probe("fp32", 2),
            PROBE_ONE: peaks.probe("fp32", 1),
        }

    def gains(times: Times) -> dict[str, float]:
        wall = {name: [spent["wall"] for spent in rounds] for name, rounds in times.items()}
        ours = median(one / two for one, two in zip(wall[ONE], wall[OURS], strict=True))
        probe = median(2 * one / two for one, two in zip(wall[PROBE_ONE], wall[PROBE], strict=True))
        return {"gain": ours, "probe_gain": probe, "of_probe": ours / probe}

    case = group.case(Settings())
    return replace(
        case, what="two threads", build=build, baseline=ONE, threads=2, clock="wall", beside=(PROBE, PROBE_ONE),
        derive=gains,
    )  # fmt: skip


def _digits(settings: Settings) -> Case:
    shapes = DIGITS[:2] if settings.quick else DIGITS
    epochs = 2 if settings.quick else DIGITS_EPOCHS

    def build() -> dict[str, Rival]:
        from mlpkit.bench.cases._digits import Digits

        digits = Digits(shapes, epochs, DIGITS_BATCH, DIGITS_RATE)
        return {
            OURS: Rival(digits.ours),
            "DataLoader loop": Rival(digits.loader),
            "sklearn without dropout and validation": Rival(digits.sklearn),
        }

    def rate(times: Times) -> dict[str, float]:
        return {
            f"trials_a_minute, {name}": 60 * len(shapes) / min(spent["cpu"] for spent in rounds)
            for name, rounds in times.items()
        }

    return Case(
        family="population",
        label=f"fits of digits: {len(shapes)} shapes, depth 0-2, widths 16-128, batch {DIGITS_BATCH}, {epochs} epochs",
        sizes={"members": len(shapes), "rows": DIGITS_BATCH, "epochs": epochs},
        what="fits",
        dtype="fp32",
        work=0.0,
        build=build,
        baseline="DataLoader loop",
        derive=rate,
    )
