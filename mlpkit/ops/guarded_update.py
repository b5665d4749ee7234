"""``guarded_update``: all that follows backward, whole or not at all. Kernels: csrc/ops/guarded_update.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DeviceError

KINDS = ("sgd", "adam", "adamw", "rmsprop", "lars", "lamb")
_OUTCOME, _CENSUS = 6, 5


class Reason(IntEnum):
    """Why a step was not taken: gradient (Inf or NaN, or found_inf was set), norm (beyond float64), scale (it or its
    reciprocal is no positive normal float32), setting (a group's number is Inf or NaN), update (the result would be).
    """

    TAKEN = 0
    GRADIENT = 1
    NORM = 2
    SCALE = 3
    SETTING = 4
    UPDATE = 5


@dataclass(frozen=True)
class GroupSettings:
    """Numbers of one parameter group, named as ``torch.optim`` names them. rmsprop's alpha is ``beta2``; trust: lars'
    coefficient; l1: adds l1 * sign(p) to the gradient."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    l1: float = 0.0
    trust: float = 1e-3
    nesterov: bool = False
    maximize: bool = False
    amsgrad: bool = False
    centered: bool = False


@dataclass(frozen=True)
class ScaleRule:
    """How the loss scale moves, as ``torch.amp.GradScaler`` moves it, within bounds. interval 0: it stays."""

    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 1.0
    ceiling: float = 2.0**24


class Outcome(NamedTuple):
    """What a guarded update did, as tensors on the parameters' device; reading one syncs, on CUDA.

    outcome: float64 (6,): taken (1 or 0), ``Reason``, global norm of the unscaled gradients before clipping (Inf or NaN
    after bad gradients), the factor that the gradients were multiplied by, index of the first tensor at fault or -1,
    number of gradients that hold Inf or NaN.
    census: float64 (tensors, 5), one row for each gradient as it came, scaled: count of NaN, count of Inf, flat index
    of the first of them or -1, largest finite magnitude, sum of the squares of the finite part.
    """

    outcome: Tensor
    census: Tensor


_STAYS = ScaleRule(interval=0)


def guarded_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    kind: str,
    settings: Sequence[GroupSettings],
    steps: Sequence[Tensor],
    groups: Sequence[int] | None = None,
    first: Sequence[Tensor] = (),
    second: Sequence[Tensor] = (),
    third: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    clip_norm: float = math.inf,
    scale: Tensor | None = None,
    clean_steps: Tensor | None = None,
    found_inf: Tensor | None = None,
    rule: ScaleRule = _STAYS,
    bounds: Tensor | None = None,
    force: bool = False,
) -> Outcome:
    """``GradScaler.unscale_``, ``clip_grad_norm_``, ``optimizer.step`` and ``GradScaler.update`` in two passes.

    The first pass reads the gradients: NaN, Inf, largest magnitude, sum of squares (in float64, so that finite
    gradients of 1e20 clip correctly). Then the step is decided on the device, without a sync. The second pass unscales,
    clips and updates ``params``, state and ``steps`` in place. A step that is not taken leaves all of them as they
    were: where a gradient is Inf or NaN, ``found_inf`` is not 0, the scale has no reciprocal, a setting is Inf or NaN,
    or the update would leave Inf or NaN in a parameter or its state. Gradients are only read.

    params: float64, float32, bfloat16 or float16, dense and without gaps; computed in float32 (float64 in that) and
    rounded once. grads: of their shapes, float64 where the parameter is, otherwise any of the other three. first,
    second, third: state as the kind needs it, of the parameters' dtype, shapes and strides, zeros at first:

        sgd, lars      first = momentum_buffer (momentum != 0); it starts as the gradient where steps is 0
        adam, adamw    first = exp_avg, second = exp_avg_sq, third = max_exp_avg_sq (amsgrad)
        rmsprop        second = square_avg, first = momentum_buffer (momentum != 0), third = grad_avg (centered)
        lamb           first = exp_avg, second = exp_avg_sq

    steps: one float32 number a parameter, steps taken; one more after a step. groups: the index into ``settings`` of
    each parameter (None: all 0). copies: float16 or bfloat16 forms of float32 params, written with them. clip_norm:
    largest global norm. scale: float32 number that the loss was multiplied by; with ``rule`` it then backs off if
    gradients were bad, or grows after ``rule.interval`` taken steps, counted in ``clean_steps`` (int32). found_inf:
    float32 number; not 0 forbids the step, and 1 is left there if gradients forbade it, else 0.
    bounds: float64 (len(params), 4): largest magnitude of each parameter, first, second and third. NaN in the first
    column: not known, so the first pass reads these tensors too. The call leaves what it knows; pass it on where
    nothing else has changed the tensors, or spoil it. With bounds an update is proven finite before it is made, where
    eps > 0 and they are not extreme; otherwise the update is tried first, which is a third pass.
    force: take the step whatever comes out, for those who want to see it.

    Bitwise the update of torch.optim's fused CPU kernels (SGD, Adam, AdamW) where the processor has FMA, after one
    rounding of gradient times factor; centred rmsprop counts a negative variance, which rounding makes, as 0.
    On CUDA nothing is read back, so that a graph can capture it; the launches are two (lamb three), one more for
    float16 or eps 0, and the upload of the list, which ``mlpkit.guard.optim`` keeps there.
    Raises ArgumentError, ValueError or TypeError for tensors that do not fit each other, DeviceError off CPU and CUDA.
    """
    _check(params, kind)
    lists = [list(tensors) for tensors in (params, grads, first, second, third, copies, steps)]
    places = [0] * len(params) if groups is None else list(groups)
    numbers = [float(number) for group in settings for number in astuple(group)]
    moves = (rule.growth, rule.backoff, rule.interval, rule.floor, rule.ceiling)
    tensors = (*lists, scale, clean_steps, found_inf, bounds)
    with torch.no_grad():
        return Outcome(*torch.ops.mlpkit.guarded_update(*tensors, kind, places, numbers, clip_norm, *moves, force))


def _check(params: Sequence[Tensor], kind: str) -> None:
    if len(params) == 0:
        raise ArgumentError("guarded_update: params is empty; it must hold at least one tensor")
    if kind not in KINDS:
        raise ArgumentError(f"guarded_update: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    for index, tensor in enumerate(params):
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise DeviceError(f"guarded_update: parameter {index} is on {tensor.device}; it must be on the CPU or CUDA")
        if tensor.device.type == "cuda" and _C.cuda_kernels() != "all":
            raise DeviceError(
                f"guarded_update: parameter {index} is on {tensor.device}, whose kernels no device has proven yet; "
                "MLPKIT_CUDA_KERNELS=all takes them"
            )


@torch.library.register_fake("mlpkit::guarded_update")  # type: ignore[untyped-decorator]
def _guarded_update_fake(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: object) -> tuple[Tensor, Tensor]:
    return (
        params[0].new_empty((_OUTCOME,), dtype=torch.float64),
        params[0].new_empty((len(params), _CENSUS), dtype=torch.float64),
    )
