"""Interception: the one place that knows how operations are seen. Everything above it reads ``OpCall`` only.

A dispatch mode sees each ATen operation below autograd, forward, backward and optimizer alike. What an operation writes
is read from its schema (results and mutable arguments), so that foreach and fused optimizer operations, which return
nothing, are seen too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

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
    """One operation as it ran: the narrow interface between interception and everything above."""

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


class Sink(Protocol):
    """What an observer of operations offers."""

    def before(self, call: OpCall) -> None:
        """An operation is about to run."""

    def viewed(self) -> None:
        """A view that autograd records is about to be made."""

    def after(self, call: OpCall) -> None:
        """It ran; ``call.outputs`` holds what it returned."""


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


def _learn(func: OpOverload) -> Traits:
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    if namespace == "mlpkit":
        name = name.removesuffix("_forward").removesuffix("_backward")
    writes: list[int | str] = []
    for position, argument in enumerate(schema.arguments):
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            writes.append(argument.name if argument.kwarg_only else position)
    writes.extend(HIDDEN_WRITES.get(name, ()))
    if namespace in _SKIPPED_NAMESPACES or schema.name == "mlpkit::census":
        kind = "skip"
    elif name in _ALLOCATORS:
        kind = "allocate"
    elif not writes and (func.is_view or name in _VIEWS):
        kind = "view"
    else:
        kind = "compute"
    return Traits(name, kind, tuple(writes), name not in _OVERWRITERS)


def _written(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    values = []
    for place in traits.writes:
        if isinstance(place, str):
            values.append(kwargs.get(place))
        elif place < len(args):
            values.append(args[place])
    return list(tensors_in(values))


class Interceptor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every operation of this thread (and of the backward passes it starts) to a sink."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sink = sink
        self._traits: dict[OpOverload, Traits] = {}
        self._process = os.getpid()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        traits = self._traits.get(func)
        if traits is None:
            traits = self._traits[func] = _learn(func)
        # A forked data-loading worker inherits the mode, but not the program that is traced.
        if traits.kind == "skip" or os.getpid() != self._process:
            return func(*args, **kwargs)
        reads = [*tensors_in(args), *tensors_in(kwargs.values())]
        graph = torch.is_grad_enabled()
        builds_graph = graph and any(tensor.requires_grad for tensor in reads)
        if traits.kind == "view":
            if builds_graph:
                self._sink.viewed()
            return func(*args, **kwargs)
        mutated = _written(traits, args, kwargs) if traits.writes else []
        call = OpCall(func, traits, args, kwargs, reads, mutated, builds_graph)
        # No autograd graph may grow while the tracer looks at tensors.
        torch._C._set_grad_enabled(False)
        try:
            if traits.keeps_old and mutated:
                call.old = {id(tensor): tensor.detach().clone() for tensor in mutated}
            self._sink.before(call)
        finally:
            torch._C._set_grad_enabled(graph)
        result = func(*args, **kwargs)
        values = result if isinstance(result, (list, tuple)) else (result,)
        own = {id(tensor) for tensor in mutated}
        call.outputs = [tensor for tensor in tensors_in(values) if id(tensor) not in own]
        torch._C._set_grad_enabled(False)
        try:
            self._sink.after(call)
        finally:
            torch._C._set_grad_enabled(graph)
        return result
