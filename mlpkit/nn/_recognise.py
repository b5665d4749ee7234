"""What fusing looks for: modules and traced calls that are activations or dropouts, and linears that must stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Activation:
    """An activation in the words of the op; slope: leaky_relu's number; prelu: the module that holds its parameter."""

    name: str
    slope: float | None = None
    prelu: nn.PReLU | None = None


@dataclass(frozen=True)
class Dropout:
    """A dropout; module: where the mode is read, None for ``F.dropout(x, p, self.training)``."""

    p: float
    module: nn.Module | None = None


class Refusal(str):
    """Why something that looks like an activation or a dropout cannot be fused."""


Step = Activation | Dropout | Refusal | None

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_CALLS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
}
_METHODS: dict[Any, str] = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}
_CLAMPS = {torch.clamp, torch.clamp_, torch.clip, torch.clamp_min, torch.clamp_min_}
_CLAMP_METHODS = {"clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"}


def of_module(module: nn.Module) -> Step:
    """What a module is, by its exact type: a subclass may do anything."""
    step = of_type(module)
    return step if step is None or isinstance(step, Refusal) else (changed(module) or step)


def of_type(module: nn.Module) -> Step:
    """What a module is by its type alone, whatever else was done to it."""
    kind = type(module)
    if kind in _MODULES:
        return Activation(_MODULES[kind])
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return Activation("gelu_tanh" if module.approximate == "tanh" else "gelu")
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return Activation("leaky_relu", slope=float(module.negative_slope))
    if isinstance(module, nn.PReLU) and kind is nn.PReLU:
        if module.weight.numel() == 1:
            return Activation("prelu", prelu=module)
        return Refusal("PReLU with a slope per channel takes dimension 1 as channels, the fused layer the last one")
    if isinstance(module, nn.Dropout) and kind is nn.Dropout:
        return Dropout(float(module.p), module)
    return None


def of_node(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    """What a call in a traced forward is; the value that it works on must be its first argument."""
    if node.op == "call_module":
        return of_module(modules[str(node.target)])
    if node.op not in ("call_function", "call_method"):
        return None
    name = (_CALLS if node.op == "call_function" else _METHODS).get(node.target)
    if name is not None:
        return Activation(name)
    if node.target in (_CLAMPS if node.op == "call_function" else _CLAMP_METHODS):
        return Activation("relu") if _clamps_at_zero(node) else Refusal("clamp with bounds other than min=0")
    if node.target is F.gelu:
        return Activation("gelu_tanh" if _argument(node, 1, "approximate", "none") == "tanh" else "gelu")
    if node.target in (F.leaky_relu, F.leaky_relu_):
        slope = _argument(node, 1, "negative_slope", 0.01)
        return Activation("leaky_relu", slope=float(slope)) if isinstance(slope, (int, float)) else None
    if node.target in (F.prelu, torch.prelu):
        return _prelu_call(node, modules)
    return None


def _clamps_at_zero(node: fx.Node) -> bool:
    low = _argument(node, 1, "min", None)
    return isinstance(low, (int, float)) and low == 0 and _argument(node, 2, "max", None) is None


def _prelu_call(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    weight = _argument(node, 1, "weight", None)
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        owner, _, name = str(weight.target).rpartition(".")
        module = modules.get(owner)
        if isinstance(module, nn.PReLU) and name == "weight":
            return of_module(module)
    return Refusal("F.prelu with a slope that belongs to no nn.PReLU")


def is_functional_dropout(node: fx.Node) -> bool:
    """Whether the node is a call of ``F.dropout``."""
    return node.op == "call_function" and node.target is F.dropout


def dropout_call(node: fx.Node) -> Dropout | Refusal | None:
    """What a call of ``F.dropout`` is whose flag ``_trace`` has made ``self.training`` where it was that."""
    if not is_functional_dropout(node):
        return None
    p, training = _argument(node, 1, "p", 0.5), _argument(node, 2, "training", True)
    if not isinstance(p, (int, float)):
        return Refusal("the probability of its F.dropout is computed")
    if isinstance(training, fx.Node) and (training.op, training.target) == ("get_attr", "training"):
        return Dropout(float(p))
    return Refusal("its F.dropout does not follow self.training")


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def changed(module: nn.Module) -> Refusal | None:
    """What makes a module of a known type do more than its type says: hooks, parametrisations, a forward of its own."""
    what = type(module).__name__
    if parametrize.is_parametrized(module):
        return Refusal(f"{what} is parametrised")
    if "weight_g" in module._parameters or "weight_orig" in module._parameters:
        return Refusal(f"{what}'s weight is computed (weight norm, spectral norm or pruning)")
    if any(getattr(module, hooks) for hooks in (*_HOOKS, *_STATE_HOOKS)):
        return Refusal(f"{what} has a hook")
    if "forward" in module.__dict__:
        return Refusal(f"{what}'s forward was replaced")
    return None


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or other things, than its type's forward: quick, for every forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def keeps_linear(module: nn.Linear) -> Refusal | None:
    """Why this linear must stay as it is, or None."""
    if type(module) is not nn.Linear:
        return Refusal(f"{type(module).__name__} is a subclass of nn.Linear")
    reason = changed(module)
    if reason is not None:
        return reason
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) is not nn.Parameter or not (bias is None or type(bias) is nn.Parameter):
        return Refusal("its weight or bias is no plain parameter")
    tensors: list[Tensor] = [weight] if bias is None else [weight, bias]
    if weight.dtype not in _DTYPES or len({tensor.dtype for tensor in tensors}) > 1:
        return Refusal(f"the fused op has no {' and '.join(str(tensor.dtype) for tensor in tensors)}")
    if weight.device.type not in ("cpu", "cuda"):
        return Refusal(f"the fused op has no kernel for {weight.device}")
    return None
