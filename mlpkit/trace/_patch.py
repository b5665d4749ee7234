"""Proposals carried out: each kind of fix as a change to the call in the blamed line, above autograd, for one run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Call = Callable[..., Any]
Change = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]

_LOW = (torch.float16, torch.bfloat16)
_DIVISIONS = ("div", "true_divide", "__truediv__", "__div__", "divide")
_REVERSED = ("__rtruediv__", "__rdiv__")
_LOGS = ("log", "log2", "log10")
_ROOTS = ("sqrt", "rsqrt", "reciprocal")
_POWERS = ("pow", "__pow__")


def _tiny(x: torch.Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny)


def _clamp(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, x = _name(func), args[0]
    if name in _POWERS and not isinstance(args[1], torch.Tensor) and args[1] < 0:
        return func(x.clamp_min(1.0 / 1024), *args[1:], **kwargs)
    if name in (*_LOGS, *_ROOTS, *_POWERS):
        return func(x.clamp_min(_tiny(x)), *args[1:], **kwargs)
    if name == "log1p":
        return func(x.clamp_min(-1 + torch.finfo(x.dtype).eps), **kwargs)
    if name in ("acos", "asin", "arccos", "arcsin", "atanh", "erfinv"):
        edge = 1 - 4 * torch.finfo(x.dtype).eps
        return func(x.clamp(-edge, edge), **kwargs)
    return None


def _safe_divisor(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    if name in _DIVISIONS and isinstance(args[1], torch.Tensor):
        return func(args[0], torch.where(args[1] == 0, 1.0, args[1]).to(args[1].dtype), *args[2:], **kwargs)
    if name in _REVERSED or name in _ROOTS:
        return func(torch.where(args[0] == 0, 1.0, args[0]).to(args[0].dtype), *args[1:], **kwargs)
    return _clamp(func, args, kwargs)


def _finite_mask(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _name(func) not in ("softmax", "log_softmax", "sub", "__sub__", "mul", "__mul__", *_DIVISIONS):
        return None
    low = torch.finfo(args[0].dtype).min / 2
    clean = [arg.clamp_min(low) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
    return func(*clean, **kwargs)


def _eps(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _name(func) in ("layer_norm", "group_norm", "rms_norm", "batch_norm"):
        # The last argument of each; only some take it by name.
        return func(*args, **{**kwargs, "eps": 1e-5}) if "eps" in kwargs else func(*_with_eps(args), **kwargs)
    if _name(func) in ("clamp", "__rsub__", "rsub") and args[0].dtype == torch.float32:
        near = lambda v: 1 - 1e-6 if isinstance(v, float) and 0 < 1 - v < 1e-7 else v  # noqa: E731
        return func(*[near(arg) for arg in args], **{name: near(value) for name, value in kwargs.items()})  # type: ignore[no-untyped-call]
    if _name(func) not in ("add", "__add__", "__radd__", "clamp", "clamp_min", "maximum"):
        return None
    dtype = next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
    least = float(torch.finfo(dtype).tiny)
    enough = lambda value: least if isinstance(value, float) and 0 < value < least else value  # noqa: E731
    return func(*[enough(arg) for arg in args], **{name: enough(value) for name, value in kwargs.items()})  # type: ignore[no-untyped-call]


def _with_eps(args: tuple[Any, ...]) -> list[Any]:
    return [1e-5 if isinstance(arg, float) and arg == 0 else arg for arg in args]


def _keep(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].float() if _name(func) in ("half", "to", "bfloat16", "type") else None


def _log_domain(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _name(func) != "exp":
        return None
    x = args[0]
    return func(x - x.detach().amax(-1, keepdim=True) if x.dim() else x - x.detach())


def _counted(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, x = _name(func), args[0]
    if name == "mean" and not args[1:] and not kwargs:
        return x.sum() / max(x.numel(), 1)
    if name in ("std", "var"):
        return func(x, *args[1:], **{**kwargs, "correction": 0}) if len(args) < 3 else None
    if name == "cross_entropy":
        ignored = kwargs.get("ignore_index", -100)
        total = func(*args, **{**kwargs, "reduction": "sum"})
        return total / max(int((args[1] != ignored).sum()), 1)
    return None


def _clip(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = args[0]
    if not isinstance(result, torch.Tensor) or _name(func) not in ("exp", "mul", "__mul__", "pow", "__pow__", "square"):
        return None
    bound = float(torch.finfo(result.dtype).max) ** 0.25 if _name(func) != "exp" else 80.0
    return func(result.clamp(-bound, bound), *args[1:], **kwargs)


def _upcast(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    wide = [arg.float() if isinstance(arg, torch.Tensor) and arg.dtype in _LOW else arg for arg in args]
    more = {k: v.float() if isinstance(v, torch.Tensor) and v.dtype in _LOW else v for k, v in kwargs.items()}
    if all(a is b for a, b in zip(wide, args)) and all(more[k] is kwargs[k] for k in kwargs):
        return None
    return func(*wide, **more)


CHANGES: dict[str, Change] = {
    "clamp": _clamp,
    "safe_where": _safe_divisor,
    "mask_finite": _finite_mask,
    "eps": _eps,
    "log_domain": _log_domain,
    "guard_count": _counted,
    "clip": _clip,
    "upcast": _upcast,
    "keep_fp32": _keep,
}


def _name(func: Call) -> str:
    return str(getattr(func, "__name__", "")).removesuffix("_")


class Patch(TorchFunctionMode):
    """Carries out one kind of fix in one line; ``applied`` counts the calls it changed."""

    def __init__(self, kind: str, location: str, short: Callable[[str], str]) -> None:
        super().__init__()
        self._change = CHANGES[kind]
        self._kind = kind
        self._location = location
        self._short = short
        self._softmax: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
        self._logits: dict[int, tuple[torch.Tensor, int]] = {}
        self.applied = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, changed where it stands in the line."""
        kwargs = kwargs or {}
        if self._kind == "log_domain" and _name(func) in ("softmax", "log"):
            return self._through_softmax(func, args, kwargs)
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and self._here():
            changed = self._change(func, args, kwargs)
            if changed is not None:
                self.applied += 1
                return changed
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if self._kind not in ("upcast", "keep_fp32") or not self.applied:
                raise
            wide = _upcast(func, args, kwargs)  # what follows an upcast call meets two dtypes
            if wide is None:
                raise
            return wide

    def _through_softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if _name(func) == "log" and self._softmax.get(id(x)) is x:
            self.applied += 1
            return F.log_softmax(self._logits[id(x)][0], self._logits[id(x)][1])
        result = func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if _name(func) == "softmax" and isinstance(dim, int) and self._here():
            self._softmax[id(result)] = result
            self._logits[id(result)] = (x, dim)
        return result

    def _here(self) -> bool:
        """Whether a frame of the call is the blamed line."""
        frame = sys._getframe(2)
        depth = 0
        while frame is not None and depth < 12:
            if f"{self._short(frame.f_code.co_filename)}:{frame.f_lineno}" == self._location:
                return True
            if frame.f_back is None:
                break
            frame, depth = frame.f_back, depth + 1
        return False
