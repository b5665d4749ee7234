"""A whole training step of 128 -> w -> w -> 10, ours beside loops with the same parts: shared by several families."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit import guard, nn
from mlpkit.bench.case import DTYPES, OURS, Case, Rival, Settings

IN, OUT, P, CLIP = 128, 10, 0.1, 1.0
# Small, and over several batches in turn: thousands of timed steps must stay ordinary training, without dead units
# whose moments run into subnormals.
LEARNING_RATE, BATCHES = 1e-4, 16
WHAT = "training step"


@dataclass(frozen=True)
class Network:
    """Cross-entropy, dropout, Adam and clipping; widths: inputs, hidden layers, classes; dtype bf16 means autocast."""

    rows: int
    widths: tuple[int, ...]
    dtype: str = "fp32"

    @classmethod
    def of_width(cls, rows: int, width: int, dtype: str = "fp32") -> Network:
        """The one that the tables tell of: 128 -> width -> width -> 10."""
        return cls(rows, (IN, width, width, OUT), dtype)

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return self.widths[1:-1]

    @property
    def work(self) -> float:
        """Operations of the products: forward and dW of every layer, dX of all but the first."""
        first, *others = (before * after for before, after in pairwise(self.widths))
        return 2.0 * self.rows * (2 * first + 3 * sum(others))

    def case(self, family: str, settings: Settings) -> Case:
        """The row of this step."""
        return Case(
            family=family,
            label=f"{' -> '.join(map(str, self.widths))}, batch {self.rows}",
            sizes={
                "rows": self.rows,
                "in_features": self.widths[0],
                "hidden": list(self.hidden),
                "out_features": self.widths[-1],
            },
            what=WHAT,
            dtype=self.dtype,
            work=self.work,
            build=lambda: self.rivals(settings),
        )

    def model(self, p: float = P) -> nn.MLP:
        """The same weights for every rival."""
        torch.manual_seed(0)
        return nn.MLP(self.widths[0], self.hidden, self.widths[-1], dropout=p)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The same data for every rival."""
        torch.manual_seed(1)
        features, classes = self.widths[0], self.widths[-1]
        return [(torch.randn(self.rows, features), torch.randint(classes, (self.rows,))) for _ in range(BATCHES)]

    def guarded(self, model: torch.nn.Module) -> Rival:
        """``TrainStep`` on a model; says which of its paths the step takes."""
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        step = guard.TrainStep(model, "cross_entropy", optimizer, precision=self.dtype, clip_norm=CLIP)
        data = cycle(self.batches())
        return Rival(lambda: step(*next(data)), about=lambda: str(getattr(step, "path", "general")))

    def ours(self, p: float = P) -> Rival:
        """``TrainStep`` on an ``nn.MLP``."""
        return self.guarded(self.model(p))

    def eager(self, *, fused: bool = False, compiles: bool = False) -> Callable[[], object]:
        """The plain loop over stock modules. fused: Adam's one kernel; compiles: the network by torch.compile."""
        model: Callable[[Tensor], Tensor] = self.model().to_sequential()
        parameters = list(model.parameters())  # type: ignore[attr-defined]
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True if fused else None)
        if compiles:
            torch.compiler.reset()
            model = torch.compile(model, fullgraph=True)
        data, dtype = cycle(self.batches()), DTYPES[self.dtype]

        def run() -> None:
            x, target = next(data)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype) if self.dtype != "fp32" else nullcontext():
                loss = F.cross_entropy(model(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()

        return run

    def sklearn(self, threads: int) -> Callable[[], object]:
        """``MLPClassifier.partial_fit`` on one batch: Adam, but neither dropout nor clipping."""
        from sklearn.neural_network import MLPClassifier
        from threadpoolctl import threadpool_limits

        # NumPy's threads would go on spinning into the time of whoever comes next.
        threadpool_limits(limits=threads, user_api="blas")

        settings = {"learning_rate_init": LEARNING_RATE, "alpha": 0.0, "batch_size": self.rows, "random_state": 0}
        model = MLPClassifier(self.hidden, **settings)
        batches = [(x.numpy(), target.numpy()) for x, target in self.batches()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a batch may lack a class
            model.partial_fit(*batches[0], classes=range(self.widths[-1]))
        data = cycle(batches)
        return lambda: model.partial_fit(*next(data))

    def rivals(self, settings: Settings) -> dict[str, Rival]:
        """All that can take this step here."""
        found = {
            OURS: self.ours(),
            "eager": Rival(self.eager()),
            "eager with fused Adam": Rival(self.eager(fused=True)),
        }
        if settings.compile:
            found["compile"] = Rival(self.eager(compiles=True))
        if self.dtype != "fp32":
            found["mlpkit fp32"] = Network(self.rows, self.widths).ours()
        elif self.widths[-1] > 1 and find_spec("sklearn") is not None:
            found["sklearn without dropout and clip"] = Rival(self.sklearn(settings.threads))
        return found
