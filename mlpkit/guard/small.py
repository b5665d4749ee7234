"""A guarded step of a small network on CUDA: three launches, nothing read back until a result is.

The kernels wait for their first results file from a device: ``MLPKIT_CUDA_KERNELS=all`` takes them, and ``python -m
mlpkit`` says what is in use. Decided on the device are loss, gradients, parameters and state, as the native way does on
the CPU; what a skipped step leaves of a record is made when its result is first looked at.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlpkit._events import listened_to
from mlpkit._ext import _C
from mlpkit.guard import bounds, native
from mlpkit.guard.census import Finding
from mlpkit.guard.losses import LOSSES, LossSpec, describe
from mlpkit.guard.modes import function_modes
from mlpkit.guard.policy import Policy
from mlpkit.guard.record import SkipRecord, Window
from mlpkit.guard.watched import Network, network_of
from mlpkit.nn import MLP

if TYPE_CHECKING:
    from mlpkit.guard.step import TrainStep

_WIDEST, _MOST_LAYERS, _MOST_GROUPS = 256, 9, 4
_UNUSUAL = ("amsgrad", "maximize", "centered", "differentiable")
_SETTINGS = ("lr", "weight_decay", "momentum", "dampening")


class SmallWindow(Window):
    """The fate of one step, on the device until somebody asks: then one sync."""

    def __init__(self, outcome: Tensor, step: TrainStep) -> None:
        self._outcome = outcome
        self._owner = weakref.ref(step)
        self._index = step.steps
        self._read: tuple[SkipRecord | None] | None = None
        super().__init__(done=True, norm=outcome[1])

    @property
    def record(self) -> SkipRecord | None:
        """What is known of the skip; None when the step was taken. The first look syncs."""
        if self._read is None:
            loss, norm, scale, taken, _ = self._outcome.tolist()
            self._read = (None if taken else self._record(loss, norm, scale),)
        return self._read[0]

    @record.setter
    def record(self, value: SkipRecord | None) -> None:
        # The general way sets it; here the device has decided.
        assert value is None

    def _record(self, loss: float, norm: float, scale: float) -> SkipRecord:
        loss_is_bad = not abs(loss) <= torch.finfo(torch.float32).max
        where, culprit, worst = ("loss", "loss", loss) if loss_is_bad else ("norm", "gradient norm", norm)
        owner = self._owner()
        record = SkipRecord.of(
            Finding.of_number(culprit, worst),
            step=self._index,
            where=where,
            parameters=len(list(owner.model.parameters())) if owner else 0,
            scale=scale,
            loss=loss,
            note="" if not math.isfinite(worst) else "A number was too large to vouch for.",
        )
        if owner is not None:
            owner.records.append(record)
            owner.skipped += 1
        return record


class SmallStep:
    """Tries the small way; ``why_not`` says why the last step (or all of them) went another."""

    def __init__(self, step: TrainStep, loss: object, policy: Policy) -> None:
        self._loss = loss
        self.never = _never(step, loss, policy)
        self.why_not: str | None = self.never or "no step was taken yet"
        self._seed: Tensor | None = None

    def attempt(self, step: TrainStep, inputs: Any, target: Any) -> Tensor | None:
        """Take the step and return (loss, norm, scale, taken, overflowed) on the device; None: another way."""
        if self.never:
            return None
        assert isinstance(step.model, MLP)
        network, spec = network_of(step.model), describe(self._loss)
        self.why_not = _not_now(step, network, spec, inputs, target)
        if self.why_not or network is None or spec is None:
            return None
        states = _states(network, step.optimizer)
        if isinstance(states, str):
            self.why_not = states
            return None
        if self._seed is None:
            # One seed a run; its offset moves on with every step, on the device.
            self._seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64).to(inputs.device)
        outcome: Tensor = torch.ops.mlpkit.mlp_step(
            inputs.contiguous(),
            target.contiguous(),
            network.parameters(),
            [layer.bias is not None for layer in network.layers],
            *states[:3],
            self._seed,
            [],
            network.activation,
            network.negative_slope,
            _rates(step.model),
            False,
            tuple(LOSSES).index(spec.kind),
            spec.reduction == "mean",
            spec.delta,
            spec.label_smoothing,
            spec.ignore_index,
            spec.weight,
            native._NAMES[type(step.optimizer)],
            [number for group in step.optimizer.param_groups for number in _numbers(group)],
            states[3],
            [],
            step.clip_norm or 0.0,
            [],
        )[0]
        for parameter in network.parameters():
            parameter.grad = None
        return outcome


def _never(step: TrainStep, loss: object, policy: Policy) -> str | None:
    """Why no step of these parts can go the small way; None if some can."""
    if _C.cuda_kernels() != "all":
        return "the kernels of small networks wait for their proof on a device: MLPKIT_CUDA_KERNELS=all takes them"
    if not hasattr(torch.ops.mlpkit, "mlp_step"):
        return "mlpkit was built without CUDA"
    if type(step.model) is not MLP or any(not one.is_cuda for one in step.model.parameters()):
        return "the model is not an nn.MLP on CUDA"
    if describe(loss) is None or type(step.optimizer) not in native._NAMES:
        return "the loss or the optimizer is not a known one"
    if step.precision != "bf16" or step.accumulate != 1 or step.scheduler is not None or step.history is not None:
        return "precision is not bf16, or there are accumulation, a scheduler or a history"
    if policy != Policy(policy.owner):
        return "a policy acts on every step, which would have to be read for it"
    return None


def _not_now(step: TrainStep, network: Network | None, spec: LossSpec | None, inputs: Any, target: Any) -> str | None:
    """Why this step cannot go the small way; None if it can."""
    model, optimizer = step.model, step.optimizer
    assert isinstance(model, MLP)
    if network is None or native._changed(model) or torch.is_autocast_enabled("cuda"):
        return "a hook, a replaced layer or autocast changes the model"
    modes = function_modes() or torch._C._len_torch_dispatch_stack() or _C.followed()
    if native._strangers() or listened_to() or modes:
        return "somebody changes or watches all modules, operations or optimizers"
    if not network.fits() or any(layer.norm or layer.slope is not None for layer in network.layers):
        return "the model has norms or prelu, or layers that do not fit each other"
    if not native._nothing_else(model, network, optimizer):
        return "the model has buffers, or the optimizer parameters, of their own"
    widths = [network.layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in network.layers)]
    if max(widths) > _WIDEST or len(network.layers) > _MOST_LAYERS:
        return f"a layer is wider than {_WIDEST}, or there are more than {_MOST_LAYERS} layers"
    if spec is None or spec.pos_weight is not None or not spec.delta > 0 or not 0 <= spec.label_smoothing <= 1:
        return "the loss has hooks, or settings that the small step does not know"
    if spec.weight is not None and not (spec.kind == "cross_entropy" and _plain(spec.weight, (widths[-1],))):
        return "class weights are not contiguous float32 on CUDA, one a class"
    rows = inputs.shape[0] if isinstance(inputs, Tensor) and inputs.dim() == 2 else 0
    by_class = spec.kind == "cross_entropy"
    wanted = (torch.int64, (rows,)) if by_class else (torch.float32, (rows, widths[-1]))
    if not rows or not _plain(inputs, (rows, widths[0])) or not isinstance(target, Tensor) or not target.is_cuda:
        return "the inputs are not contiguous float32 rows of in_features on CUDA"
    if (target.dtype, tuple(target.shape)) != wanted or target.requires_grad:
        return f"the target is not {wanted[0]} of shape {wanted[1]}"
    unusual = any(group.get(name) for group in optimizer.param_groups for name in _UNUSUAL)
    if not bounds.provable(optimizer) or unusual or len(optimizer.param_groups) > _MOST_GROUPS:
        return "the optimizer has hooks or settings that the native update does not vouch for"
    return None


States = tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]  # first and second moments, step counts, groups


def _states(network: Network, optimizer: torch.optim.Optimizer) -> States | str:
    """State of every parameter as the op takes it; a reason where some is missing or unusual."""
    groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    kind = native._NAMES[type(optimizer)]
    heavy = {bool(group.get("momentum", 0.0)) for group in optimizer.param_groups}
    if len(heavy) > 1 or (kind == "rmsprop" and True in heavy):
        return "momentum differs between groups, or is RMSprop's"
    keys = (None, None, None) if kind == "sgd" and True not in heavy else (*native._STATE[kind], "step")
    found: States = ([], [], [], [])
    for parameter in network.parameters():
        if id(parameter) not in groups or not parameter.requires_grad or not _plain(parameter, parameter.shape, True):
            return "a parameter is frozen, not contiguous float32 on CUDA, or not the optimizer's"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "a parameter has a gradient hook"
        found[3].append(groups[id(parameter)])
        for key, into in zip(keys, found[:3]):
            if key is None or (kind == "sgd" and key == "step"):
                continue
            value = optimizer.state.get(parameter, {}).get(key)
            if not _plain(value, () if key == "step" else parameter.shape):
                return f"{key} is not on the device: the first step, the general way, puts it there, with fused=True"
            into.append(value)
    if len({id(parameter) for parameter in network.parameters()}) < len(network.parameters()):
        return "two layers share a parameter"
    return found


def _plain(tensor: Any, shape: Sequence[int], trained: bool = False) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.is_cuda
        and tensor.dtype == torch.float32
        and tuple(tensor.shape) == tuple(shape)
        and tensor.is_contiguous()
        and tensor.requires_grad == trained
        and not native._unusual(tensor)
    )


def _rates(model: MLP) -> list[float]:
    hidden: list[Any] = list(model.layers)[:-1]
    return [float(layer.dropout) if model.training and layer.training else 0.0 for layer in hidden]


def _numbers(group: dict[str, Any]) -> list[float]:
    beta1, beta2 = group.get("betas", (0.0, group.get("alpha", 0.0)))
    return [
        *(float(group.get(name, 0.0)) for name in _SETTINGS),
        *(float(beta1), float(beta2), float(group.get("eps", 0.0)), float(group.get("nesterov", False))),
    ]
