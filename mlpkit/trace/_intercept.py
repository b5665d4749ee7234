"""Interception: what an operation is. Everything above reads ``OpCall`` only.

The native observer (csrc/bindings_observe.h) stands in the dispatcher below autograd and sees each operation that
computes, forward, backward and optimizer alike. What an operation writes is read from its schema once (results and
mutable arguments), so that foreach and fused optimizer operations, which return nothing, are seen too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_SKIPPED_NAMESPACES = frozenset({"profiler", "prim", "prims", "debugprims"})
_ALLOCATORS = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "set_"}
)
_VIEWS = frozenset({"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "lift", "detach_"})
# These write an argument without reading it, so its old value explains nothing.
_OVERWRITERS = frozenset(
    {
        "copy_",
        "fill_",
        "zero_",
        "normal_",
        "uniform_",
        "bernoulli_",
        "random_",
        "exponential_",
        "log_normal_",
        "cauchy_",
    }
)
_REACH = {
    **dict.fromkeys(("relu", "neg", "abs", "floor", "ceil", "round", "trunc"), "own"),
    **dict.fromkeys(("add", "sub"), "sum"),
    "mul": "product",
    "div": "quotient",
    "lerp": "lerp",
    "addcmul": "addcmul",
    "addcdiv": "addcdiv",
    "_fused_adam": "adam",
    "_fused_adamw": "adam",
    "_fused_sgd": "sgd",
}
# Schemas that hide a mutation: (running mean, running variance) are updated in training mode.
HIDDEN_WRITES = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}


@dataclass(frozen=True, slots=True)
class Traits:
    """What the schema says about an operation."""

    name: str
    kind: str  # "compute", "view", "allocate" or "skip"
    writes: tuple[int | str, ...]
    keeps_old: bool


@dataclass(slots=True, eq=False)
class OpCall:
    """One operation as it ran: the narrow interface between interception and everything above.

    old: values that mutated arguments had before, by ``id``; kept only where the operands' magnitudes did not rule out
    a non-finite result.
    """

    func: OpOverload
    traits: Traits
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[torch.Tensor]
    mutated: list[torch.Tensor]
    builds_graph: bool
    outputs: list[torch.Tensor] = field(default_factory=list)
    old: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """ATen base name, without namespace and overload."""
        return self.traits.name

    def before(self, value: torch.Tensor) -> torch.Tensor:
        """The value an argument had when the operation began."""
        return self.old.get(id(value), value)


def is_plain(value: object) -> bool:
    """A dense floating-point tensor with memory behind it."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in FLOATS
        and value.layout is torch.strided
        and value.device.type != "meta"
        and not value.is_nested
        and type(value) in (torch.Tensor, torch.nn.Parameter)
    )


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Plain tensors among values, one level of lists deep, as schemas have them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if is_plain(value):
                yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if is_plain(item))


def find(name: str, overload: str) -> OpOverload | None:
    """The operator as Python calls it; None where Python has none."""
    namespace, _, base = name.partition("::")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except AttributeError:
        return None
    return found if isinstance(found, OpOverload) else None


def describe(func: OpOverload) -> tuple[Traits, list[int]]:
    """What the schema says, and the positions of all arguments that are written."""
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    if namespace == "mlpkit":
        name = name.removesuffix("_forward").removesuffix("_backward")
    positions = [
        position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    positions.extend(HIDDEN_WRITES.get(name, ()))
    arguments = schema.arguments
    writes = tuple(arguments[place].name if arguments[place].kwarg_only else place for place in positions)
    if namespace in _SKIPPED_NAMESPACES or schema.name == "mlpkit::census":
        kind = "skip"
    elif name in _ALLOCATORS:
        kind = "allocate"
    elif not writes and (func.is_view or name in _VIEWS):
        kind = "view"
    else:
        kind = "compute"
    reads = name not in _OVERWRITERS and not all(isinstance(place, str) for place in writes)
    return Traits(name, kind, writes, reads), positions


def reach(name: str) -> str:
    """How far the results of an in-place operation can reach, in the words of csrc/ops/observed.h."""
    return _REACH.get(name.removeprefix("_foreach_").removesuffix("_"), "unknown") if name.endswith("_") else "unknown"
