"""Replay: the first bad operation of a run again, in a fresh process, from a bundle that is data and nothing else."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from mlpkit.errors import DataError
from mlpkit.report._extras import require
from mlpkit.trace import _cause
from mlpkit.trace._allowed import is_allowed
from mlpkit.trace._capture import LARGEST, VERSION
from mlpkit.trace._intercept import HIDDEN_WRITES, OpCall, Traits, tensors_in
from mlpkit.trace._numbers import short

_MEMBERS = {"bundle.json": 1 << 20, "tensors.safetensors": LARGEST}
_KEYS = frozenset(
    {"format", "version", "op", "overload", "args", "kwargs", "results", "order", "threads", "torch", "diagnosis"}
)
_DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool")
}
_DTYPES |= {name: getattr(torch, name) for name in ("int8", "uint8", "int16")}
_FORMATS = {name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last")}
_MOST_RESULT = 4 * LARGEST  # bytes
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Replay:
    """What came of it: same is True where every bit of every result is the recorded one."""

    op: str
    same: bool
    cause: str
    value: str
    exact: float | None
    text: str
    recorded: str
    torch: str

    def __str__(self) -> str:
        bits = "bit for bit" if self.same else f"not bit for bit (recorded under torch {self.torch})"
        what = f"gave {self.value}: {self.text} ({self.cause})" if self.value else "gave finite numbers"
        return f"{self.op} {what}, as recorded, {bits}." if self.same else f"{self.op} {what}; {bits}."


def replay(path: str | os.PathLike[str]) -> Replay:
    """Run the operation of a bundle again. Runs no code from the file and reads no other file.

    Raises DataError where the file is no bundle, is damaged or names an operation that a bundle may not run.
    """
    words, tensors = _read(Path(path))
    func = _operator(words)
    args = [_unpack(value, tensors) for value in words["args"]]
    kwargs = {str(name): _unpack(value, tensors) for name, value in words["kwargs"].items()}
    recorded = [_unpack(value, tensors) for value in words["results"]]
    threads = words["threads"]
    before = torch.get_num_threads()
    try:
        _measure(func, args, kwargs)
        torch.set_num_threads(threads)  # a sum is taken in as many parts as there were threads
        return _run(func, args, kwargs, recorded, words)
    except _FAILURES as error:
        raise DataError(f"replay: {func} does not take what the bundle holds: {str(error).splitlines()[0]}") from error
    finally:
        torch.set_num_threads(before)


def _run(
    func: OpOverload, args: list[Any], kwargs: dict[str, Any], recorded: list[Any], words: dict[str, Any]
) -> Replay:
    schema = func._schema
    positions = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    positions.extend(HIDDEN_WRITES.get(schema.name.partition("::")[2], ()))
    writes = tuple(schema.arguments[i].name if schema.arguments[i].kwarg_only else i for i in positions)
    mutated = list(tensors_in([kwargs.get(place) if isinstance(place, str) else args[place] for place in writes]))
    old = {id(tensor): tensor.clone() for tensor in mutated}
    with torch.no_grad():
        result = func(*args, **kwargs)
    own = set(old)
    values = result if isinstance(result, (list, tuple)) else (result,)
    outputs = [tensor for tensor in tensors_in(values) if id(tensor) not in own]
    written = [*outputs, *mutated]
    if not all(isinstance(tensor, torch.Tensor) for tensor in recorded):
        raise DataError("replay: the recorded results are no tensors")
    same = len(written) == len(recorded) and all(_same_bits(a, b) for a, b in zip(written, recorded))
    reads = [*tensors_in(args), *tensors_in(kwargs.values())]
    traits = Traits(schema.name.partition("::")[2], "compute", writes, True)
    call = OpCall(func, traits, tuple(args), kwargs, reads, mutated, False, outputs, old)
    bad = next((i for i, tensor in enumerate(written) if not bool(torch.isfinite(tensor).all())), None)
    told = words["diagnosis"] if isinstance(words["diagnosis"], dict) else {}
    sentence = str(told.get("sentence", ""))
    if bad is None:
        rounded = _cause.rounded_to_zero(call, written[0], 0) if written else None
        value, cause, text = ("0", rounded.cause, rounded.text) if rounded else ("", "", "")
        return Replay(
            traits.name, same, cause, value, rounded.exact if rounded else None, text, sentence, str(words["torch"])
        )
    which = bad - len(outputs) if bad >= len(outputs) else bad
    inputs_nan = any(bool(torch.isnan(call.before(tensor)).any()) for tensor in reads)
    nan = bool(torch.isnan(written[bad]).any()) and not inputs_nan
    finding = _cause.explain(call, written[bad], which, bad, nan=nan)
    return Replay(
        traits.name, same, finding.cause, finding.value, finding.exact, finding.text, sentence, str(words["torch"])
    )


def _same_bits(here: torch.Tensor, there: torch.Tensor) -> bool:
    if here.shape != there.shape or here.dtype != there.dtype:
        return False
    return _bits(here) == _bits(there)


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


# Reading, without trust.


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        size = path.stat().st_size
        if size > LARGEST + (1 << 20):
            raise DataError(f"replay: {path} holds {size} bytes; a bundle holds {LARGEST} at most")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(archive.infolist()) != len(_MEMBERS) or set(members) != set(_MEMBERS):
                raise DataError(f"replay: {path} is no bundle: it must hold {' and '.join(_MEMBERS)}, and nothing else")
            contents = {name: _member(archive, members[name], path) for name in _MEMBERS}
    except (
        OSError,
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        struct.error,
        RuntimeError,
        ValueError,
    ) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no bundle, or damaged"
        raise DataError(f"replay: cannot read {path}: {reason}") from error
    words = _words(contents["bundle.json"], path)
    return words, _tensors(contents["tensors.safetensors"], words, path)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bytes:
    """The bytes of one member; nothing is ever written to disk, and nothing compressed is opened."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > _MEMBERS[info.filename]:
        raise DataError(f"replay: {path}: {info.filename} is compressed or larger than {_MEMBERS[info.filename]} bytes")
    if info.flag_bits & 1 or info.compress_size != info.file_size:
        raise DataError(f"replay: {path}: {info.filename} is encrypted or of two sizes")
    with archive.open(info) as stream:
        return stream.read(_MEMBERS[info.filename] + 1)


def _words(text: bytes, path: Path) -> dict[str, Any]:
    try:
        words = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"replay: {path}: bundle.json is no JSON") from error
    if not isinstance(words, dict) or words.get("format") != "mlpkit bundle":
        raise DataError(f"replay: {path}: bundle.json does not describe a bundle")
    if words.get("version") != VERSION:
        raise DataError(f"replay: {path} is of version {words.get('version')!r}; this mlpkit reads version {VERSION}")
    fits = (
        set(words) == _KEYS
        and isinstance(words["op"], str)
        and isinstance(words["overload"], str)
        and isinstance(words["args"], list)
        and isinstance(words["kwargs"], dict)
        and isinstance(words["results"], list)
        and isinstance(words["order"], dict)
        and type(words["threads"]) is int
        and 1 <= words["threads"] <= 1024
    )
    if not fits:
        raise DataError(f"replay: {path}: bundle.json lacks a part or holds one of the wrong kind")
    return words


def _tensors(data: bytes, words: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    safetensors: Any = require("safetensors.torch", "mlpkit replay", "trace")
    try:
        found: dict[str, torch.Tensor] = safetensors.load(data)
    except Exception as error:  # the reader's own errors have no common class
        raise DataError(f"replay: {path}: tensors.safetensors is damaged: {str(error).splitlines()[0][:80]}") from error
    tensors = {}
    for name, tensor in found.items():
        order = words["order"].get(name)
        if tensor.dtype not in _DTYPES.values() or not isinstance(order, list):
            raise DataError(f"replay: {path}: tensor {name[:20]!r} is of a dtype or order that no bundle has")
        if not all(type(dim) is int for dim in order) or sorted(order) != list(range(tensor.dim())):
            raise DataError(
                f"replay: {path}: tensor {name[:20]!r} has {tensor.dim()} dimensions, not this order of them"
            )
        tensors[name] = tensor.permute(order)
    return tensors


def _operator(words: dict[str, Any]) -> OpOverload:
    op, overload = words["op"], words["overload"]
    if not is_allowed(op):
        raise DataError(f"replay: a bundle may not run {op[:60]!r}")
    namespace, _, name = op.partition("::")
    if namespace == "mlpkit":
        import mlpkit.functional  # noqa: F401 - registers the operators
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload or "default", None) if packet is not None else None
    if not isinstance(found, OpOverload) or overload == "out":
        raise DataError(f"replay: this torch has no {op[:60]}.{overload[:30]}")
    return found


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The reverse of packing; anything else is refused."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, told),) = value.items()
        if isinstance(told, str):
            if kind == "n":
                return _number(told)
            known = {"tensor": tensors, "dtype": _DTYPES, "memory_format": _FORMATS}.get(kind, {})
            if told in known:
                return known[told]
            if (kind, told) in (("device", "cpu"), ("layout", "strided")):
                return torch.device("cpu") if kind == "device" else torch.strided
    raise DataError(f"replay: the bundle holds an argument that is none: {str(value)[:60]}")


def _number(text: str) -> int | float:
    try:
        if text.lstrip("-").isdigit() and len(text) < 20:
            return int(text)
        return float(text)
    except ValueError as error:
        raise DataError(f"replay: {text[:30]!r} is no number") from error


def _measure(func: OpOverload, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Refuse what would allocate far more than a bundle holds, before it runs."""

    def shape(value: Any) -> Any:
        if isinstance(value, list):
            return [shape(item) for item in value]
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    try:
        with torch.no_grad():
            result = func(*[shape(value) for value in args], **{name: shape(value) for name, value in kwargs.items()})
    except _FAILURES:
        return  # without a shape rule; what is allowed allocates in proportion to its operands
    values = result if isinstance(result, (list, tuple)) else (result,)
    total = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
    if total > _MOST_RESULT or not math.isfinite(total):
        raise DataError(f"replay: {func} would allocate {short(float(total))} bytes")
