"""All that follows backward: unscale, check, clip, update, move the scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mlpkit.bench.case import OURS, Case, Rival, Settings
from mlpkit.bench.peak import Peaks
from mlpkit.guard import DeviceScale, optim
from mlpkit.ops.guarded_update import ScaleRule

CLIP, RATE = 1.0, 1e-5
SMALL = ((128, 128), (128,), (64, 128), (64,), (10, 64), (10,))
LARGE = ((2048, 2048),) * 4


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """Adam after backward with loss scale and clipping: one guarded call against torch.amp's scaler and its chain."""
    if settings.quick:
        return [_case("8 parameters", ((4, 2),))]
    return [_case("25k parameters, an MLP's tensors", SMALL), _case("16.8M parameters, 4 tensors", LARGE)]


def _case(label: str, shapes: Sequence[tuple[int, ...]]) -> Case:
    def build() -> dict[str, Rival]:
        return {OURS: Rival(_ours(_parameters(shapes))), "torch": Rival(_torch(_parameters(shapes)))}

    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return Case(
        family="update",
        label=label,
        sizes={"elements": elements, "tensors": len(shapes)},
        what="after backward",
        dtype="fp32",
        work=0.0,
        build=build,
        baseline="torch",
        note="torch: GradScaler.unscale_, clip_grad_norm_, fused Adam, GradScaler.update",
    )


def _parameters(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """With gradients of a norm of about 2: torch clips them in place the first time, and hardly afterwards."""
    torch.manual_seed(0)
    found: list[Tensor] = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    elements = sum(parameter.numel() for parameter in found)
    for parameter in found:
        parameter.grad = torch.randn_like(parameter) * (2 * CLIP / elements**0.5)
    return found


def _ours(parameters: list[Tensor]) -> Callable[[], object]:
    optimizer = optim.Adam(parameters, lr=RATE, clip_norm=CLIP)
    scale = DeviceScale(1.0, ScaleRule(interval=1_000_000))
    return lambda: optimizer.step(scale=scale)


def _torch(parameters: list[Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    # 1, so that gradients that are unscaled in place again and again stay what they are.
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1_000_000)
    scaler.scale(torch.ones(()))

    def after_backward() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, CLIP)
        scaler.step(optimizer)
        scaler.update()

    return after_backward
