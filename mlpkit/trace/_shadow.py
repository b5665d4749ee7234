"""Operands of one element and the exact (fp64) value of what an operation computed there.

Element-wise operations are evaluated on that element alone, matrix products on its row and column, anything else whole.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from mlpkit.trace._intercept import OpCall, is_plain, tensors_in

_LARGEST = 1 << 26  # elements; a larger operation is not evaluated again in fp64
_LEFT_RIGHT = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "_addmm_activation": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
    "linear": ("input", "weight"),
    "linear_act_dropout": ("x", "weight"),
}
_LISTS = ("_foreach_", "_fused_")
_UNEVALUABLE = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


class Terms(NamedTuple):
    """The sum behind one element of a matrix product: added + scale * sum(left * right)."""

    left: torch.Tensor
    right: torch.Tensor
    added: float
    scale: float


def base_name(name: str) -> str:
    """``_foreach_add_`` and ``add_`` follow the rules of ``add``."""
    return name.removeprefix("_foreach_").removesuffix("_") if name != "_" else name


def arguments(call: OpCall) -> dict[str, Any]:
    """Arguments by schema name, with the values they had before the operation ran."""
    named = dict(zip((argument.name for argument in call.func._schema.arguments), call.args))
    named.update(call.kwargs)
    return {name: _past(call, value) for name, value in named.items()}


def is_elementwise(call: OpCall) -> bool:
    """One output element depends on the same element of every argument."""
    name = call.name
    return (
        torch.Tag.pointwise in call.func.tags
        or (name.startswith(_LISTS) and "norm" not in name)
        or name in ("_to_copy", "copy_", "clone")
    )


def operands_at(call: OpCall, which: int, index: list[int], shape: torch.Size) -> dict[str, float]:
    """Numbers that entered one element of an element-wise operation, by argument name."""
    found: dict[str, float] = {}
    for name, value in arguments(call).items():
        element = _element(_item(value, which), index, shape)
        if isinstance(element, (int, float, torch.Tensor)) and not isinstance(element, bool):
            found[name] = float(element)
    return found


def scalars(call: OpCall, which: int) -> list[float]:
    """Python numbers among the arguments."""
    values = (_item(value, which) for value in (*call.args, *call.kwargs.values()))
    return [float(value) for value in values if isinstance(value, float)]


def terms(call: OpCall, index: list[int]) -> Terms | None:
    """Row and column behind one element, if the operation is a matrix product."""
    if call.name not in _LEFT_RIGHT or "backward" in str(call.func):
        return None
    named = arguments(call)
    left, right = (named[name].double() for name in _LEFT_RIGHT[call.name])
    if call.name in ("linear", "linear_act_dropout"):
        right = right.t()
    row = left if left.dim() == 1 else left[tuple(index[: left.dim() - 1])]
    if right.dim() == 1:
        column = right
    else:
        batch = index[:-2] if right.dim() > 2 else []
        column = right[(*batch, slice(None), index[-1])]
    bias = named.get("bias") if "linear" in call.name else (named.get("self") if "mat1" in named else None)
    added = 0.0
    if isinstance(bias, torch.Tensor):
        shape = (*left.shape[:-1], right.shape[-1])
        added = float(bias.expand(shape)[tuple(index)]) * float(named.get("beta", 1))
    return Terms(row, column, added, float(named.get("alpha", 1)))


def exact(call: OpCall, which: int, output: int, index: list[int], shape: torch.Size) -> float | None:
    """The fp64 value of one element, or None where the operation cannot be evaluated again."""
    product = terms(call, index)
    if product is not None:
        value = product.added + product.scale * float((product.left * product.right).sum())
        return None if math.isnan(value) else value
    if torch.Tag.nondeterministic_seeded in call.func.tags:
        return None
    try:
        if is_elementwise(call):
            return _elementwise(call, which, index, shape)
        results = whole(call)
        return float(results[output][tuple(index)]) if output < len(results) else None
    except _UNEVALUABLE:
        return None


def _elementwise(call: OpCall, which: int, index: list[int], shape: torch.Size) -> float | None:
    if call.name in ("_to_copy", "copy_", "clone"):
        source = arguments(call).get("src", arguments(call).get("self"))
        return float(_element(source, index, shape))

    def narrow(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value and call.name.startswith(_LISTS):
            return [narrow(_item(value, which))]
        if isinstance(value, torch.Tensor):
            element = _element(value, index, shape)
            return element.double() if is_plain(element) else element.clone()
        return torch.float64 if isinstance(value, torch.dtype) else value

    args = [narrow(_past(call, value)) for value in call.args]
    kwargs = {name: narrow(_past(call, value)) for name, value in call.kwargs.items()}
    result = call.func(*args, **kwargs)
    if result is None:
        result = _mutated_list(call, args, which)
    if isinstance(result, (list, tuple)):
        result = result[0]
    return float(result)


def _mutated_list(call: OpCall, args: list[Any], which: int) -> Any:
    """Of the lists an operation mutates, the one that the ``which``-th mutated tensor belongs to."""
    positions = [place for place in call.traits.writes if isinstance(place, int) and call.args[place]]
    return args[positions[which // max(len(call.args[positions[0]]), 1)]]


def whole(call: OpCall) -> list[torch.Tensor]:
    """All floating-point results of an operation, computed again in fp64; empty where that cannot be done."""
    if sum(tensor.numel() for tensor in call.reads) > _LARGEST or torch.Tag.nondeterministic_seeded in call.func.tags:
        return []

    def widen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [widen(item) for item in value]
        if is_plain(value):
            return value.double() if value.dtype != torch.float64 else value.clone()
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    args = [widen(_past(call, value)) for value in call.args]
    kwargs = {name: widen(_past(call, value)) for name, value in call.kwargs.items()}
    for position, argument in enumerate(call.func._schema.arguments):
        if argument.name == "half_to_float" and position < len(args):
            args[position] = False
    try:
        result = call.func(*args, **kwargs)
    except _UNEVALUABLE:
        return []
    results = result if isinstance(result, (list, tuple)) else (result,)
    return list(tensors_in(results)) or list(tensors_in(args))


def _past(call: OpCall, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [call.before(item) if isinstance(item, torch.Tensor) else item for item in value]
    return call.before(value) if isinstance(value, torch.Tensor) else value


def _item(value: Any, which: int) -> Any:
    if isinstance(value, (list, tuple)):
        return value[which % len(value)] if value else None
    return value


def _element(value: Any, index: list[int], shape: torch.Size) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == shape or value.dim() == 0:
        return value.detach()[tuple(index)] if value.dim() else value.detach()
    try:
        return value.detach().expand(shape)[tuple(index)]
    except RuntimeError:
        return None
