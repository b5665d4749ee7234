"""What the first bad operation was given, kept so that a bundle can run it again: plain data and tensors, no code."""

from __future__ import annotations

import io
import json
import zipfile
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from mlpkit.report._extras import require
from mlpkit.trace._intercept import OpCall

LARGEST = 50 << 20  # bytes of a bundle
VERSION = 1
_MOST = 8  # calls kept at once


@dataclass(slots=True, eq=False)
class Capture:
    """One call: its operator, its arguments as a tree of plain data, and the tensors that the tree names."""

    op: str
    overload: str
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    strides: dict[str, list[int]] = field(default_factory=dict)
    size: int = 0

    def drop(self) -> None:
        """Let go of the tensors."""
        self.tensors.clear()


class Captures:
    """The first and the latest few calls that gave birth to a bad value."""

    def __init__(self) -> None:
        self._kept: deque[Capture] = deque()

    def take(self, call: OpCall) -> Capture | None:
        """Keep a call; None where it cannot be run again: random, too large, or of unusual arguments."""
        if torch.Tag.nondeterministic_seeded in call.func.tags:
            return None
        namespace = call.func._schema.name
        capture = Capture(namespace, call.func._schema.overload_name, [], {}, [])
        before = lambda tensor: call.before(tensor)  # noqa: E731
        try:
            capture.args = [_pack(value, capture, before) for value in call.args]
            capture.kwargs = {name: _pack(value, capture, before) for name, value in call.kwargs.items()}
            same = lambda tensor: tensor  # noqa: E731
            capture.results = [_pack(value, capture, same) for value in (*call.outputs, *call.mutated)]
        except (TypeError, OverflowError):
            return None
        self._kept.append(capture)
        while len(self._kept) > _MOST or sum(kept.size for kept in self._kept) > 2 * LARGEST:
            middle = min(_MOST // 2, len(self._kept) - 1)
            self._kept[middle].drop()
            del self._kept[middle]
        return capture if capture.tensors else None


def _pack(value: Any, capture: Capture, before: Any) -> Any:
    """A value as JSON can hold it; tensors by name. Raises TypeError for what a bundle cannot hold."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return {"n": repr(float(value)) if isinstance(value, float) else str(value)}
    if isinstance(value, (list, tuple)):
        return [_pack(item, capture, before) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, torch.layout) and value == torch.strided:
        return {"layout": "strided"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_complex():
        raise TypeError(type(value).__name__)
    return {"tensor": _keep(before(value).detach(), capture)}


def _keep(tensor: torch.Tensor, capture: Capture) -> str:
    capture.size += tensor.numel() * tensor.element_size()
    if capture.size > LARGEST - (1 << 20):
        raise OverflowError("too large for a bundle")
    name = f"t{len(capture.tensors)}"
    # Strides decide how a sum is taken; a tensor that overlaps itself is kept as if it did not.
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.stride()[dim], reverse=True)
    copy = torch.empty([tensor.shape[dim] for dim in order], dtype=tensor.dtype)
    back = [order.index(dim) for dim in range(tensor.dim())]
    copy.permute(back).copy_(tensor)
    capture.tensors[name] = copy
    capture.strides[name] = back
    return name


def bundle(capture: Capture, told: dict[str, Any]) -> bytes:
    """The file: a zip of ``bundle.json`` and ``tensors.safetensors``, neither compressed."""
    saved = require("safetensors.torch", "a replay bundle", "trace").save(capture.tensors)
    words = {
        "format": "mlpkit bundle",
        "version": VERSION,
        "op": capture.op,
        "overload": capture.overload,
        "args": capture.args,
        "kwargs": capture.kwargs,
        "results": capture.results,
        "order": capture.strides,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diagnosis": told,
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("bundle.json"), json.dumps(words, allow_nan=False))
        archive.writestr(zipfile.ZipInfo("tensors.safetensors"), saved)
    return stream.getvalue()
