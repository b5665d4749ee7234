"""What it costs to be traced, beside the tools that people use today."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlpkit.bench.case import OURS, Case, Rival, Settings
from mlpkit.bench.peak import Peaks
from mlpkit.trace import Tracer

Step = Callable[[], None]
Training = tuple[nn.Module, Step]


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """Training steps under a tracer against the plain loop, anomaly detection, a check of every result and, where it is
    installed, Hugging Face's DebugUnderflowOverflow."""
    if settings.quick:
        return [_case("MLP 8-8-8-2", 2, lambda: _mlp(8, 8, 2, 4))]
    return [
        _case("MLP 64-256-256-10, 128 rows", 50, lambda: _mlp(64, 256, 10, 128)),
        _case("transformer encoder, 4 x 256, 8 x 128 tokens", 2, _transformer),
        _case("MLP 1024-4096-4096-1024, 256 rows", 2, lambda: _mlp(1024, 4096, 1024, 256)),
    ]


class IsFinite(TorchDispatchMode):
    """Asks of every result whether it is finite, as the recipes do; counts instead of raising."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bad = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.bad += not torch.isfinite(value).all().item()
        return result


def _anomaly() -> AbstractContextManager[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.autograd.set_detect_anomaly(True)


def _case(label: str, steps: int, training: Callable[[], Training]) -> Case:
    def under(
        tool: Callable[[], AbstractContextManager[Any]], attach: Callable[[nn.Module], object] = lambda model: None
    ) -> Rival:
        model, step = training()
        attach(model)

        def call() -> None:
            with tool():
                for _ in range(steps):
                    step()

        return Rival(call)

    def build() -> dict[str, Rival]:
        rivals = {
            OURS: under(lambda: Tracer(level="watch")),
            "observe": under(Tracer),
            "eager": under(nullcontext),
            "detect_anomaly": under(_anomaly),
            "isfinite mode": under(IsFinite),
        }
        if find_spec("transformers"):
            hooks = import_module("transformers.debug_utils").DebugUnderflowOverflow
            rivals["DebugUnderflowOverflow"] = under(nullcontext, hooks)
        return rivals

    return Case(
        family="trace",
        label=label,
        sizes={"steps": steps},
        what="watched training",
        dtype="fp32",
        work=0.0,
        build=build,
        note=f"{steps} steps a call, tracer entered and left in each; mlpkit is level watch, observe the other",
    )


def _mlp(width: int, hidden: int, classes: int, rows: int) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )
    x, target = torch.randn(rows, width), torch.randint(classes, (rows,))
    return _step(model, x, target, torch.optim.SGD(model.parameters(), 1e-3))


def _transformer() -> Training:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(256, 256), _ByClass())
    x, target = torch.randn(8, 128, 256), torch.randint(256, (8, 128))
    return _step(model, x, target, torch.optim.AdamW(model.parameters(), 1e-4))


def _step(model: nn.Module, x: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> Training:
    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return model, step


class _ByClass(nn.Module):
    """(rows, tokens, classes) as cross-entropy takes it: (rows, classes, tokens)."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.transpose(1, 2)
