"""What is searched: every part of an MLP and its training, with defaults for any table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlpkit.errors import ArgumentError, DataError
from mlpkit.report._extras import require
from mlpkit.tune import spec as known
from mlpkit.tune.parts import Choice, Part, Range, Value, listed, powers_of_two, read_part
from mlpkit.tune.spec import Spec
from mlpkit.tune.table import nearest

__all__ = ["Choice", "Encoding", "Params", "Range", "Space", "widths"]

Params = dict[str, Value]

SHAPES = ("wide", "tapered", "funnel")
SCALINGS = ("standard", "robust")
_MOST_WAVED = 32
_MOST_LAYERS, _WIDEST, _NARROWEST = 8, 65536, 4

# In this order they are drawn: what a condition below asks for comes first.
DEFAULTS: dict[str, Part] = {
    "layers": Choice((0, 1, 2, 3)),
    "width": Choice(powers_of_two(16, 256)),
    "shape": Choice(SHAPES),
    "expand": Choice((False, True)),
    "activation": Choice(("relu", "gelu", "silu", "tanh")),
    "norm": Choice((None, "batch", "layer")),
    "init": Choice(("xavier_uniform", "he_normal")),
    "dropout": Range(0.0, 0.9),
    "optimizer": Choice(("adamw", "adam", "sgd", "rmsprop")),
    "lr": Range(1e-5, 1e-1, log=True),
    "schedule": Choice(("constant", "cosine", "exponential", "coslog4")),
    "lr_decay": Range(1e-3, 1.0, log=True),
    "momentum": Range(0.5, 0.99, log=True, complement=True),
    "beta1": Range(0.7, 0.99, log=True, complement=True),
    "beta2": Range(0.9, 0.9999, log=True, complement=True),
    "weight_decay": Range(1e-4, 1e-2, log=True),
    "l1": Choice((0.0, 1e-5, 1e-4, 1e-3)),
    "batch_size": Choice(powers_of_two(16, 256)),
    "epochs": Choice((50, 100, 200, 400)),
    "loss": Choice((*known.CLASS_LOSSES, *known.NUMBER_LOSSES)),
    "label_smoothing": Choice((0.0, 0.05, 0.1)),
    "scaling": Choice(SCALINGS),
    "periodic": Choice((0.0, 0.1, 0.3, 1.0)),
    "log_target": Choice((False, True)),
}

# A part without a line here always matters.
_CONDITIONS: dict[str, Callable[[Params], bool]] = {
    "width": lambda params: params["layers"] != 0,
    "shape": lambda params: int(params["layers"] or 0) >= 2,
    "expand": lambda params: int(params["layers"] or 0) >= 2,
    "activation": lambda params: params["layers"] != 0,
    "norm": lambda params: params["layers"] != 0,
    "dropout": lambda params: params["layers"] != 0,
    "lr_decay": lambda params: params["schedule"] in ("cosine", "exponential"),
    "momentum": lambda params: params["optimizer"] in ("sgd", "rmsprop"),
    "beta1": lambda params: params["optimizer"] in ("adam", "adamw"),
    "beta2": lambda params: params["optimizer"] in ("adam", "adamw"),
    "label_smoothing": lambda params: params["loss"] == "cross_entropy",
    "periodic": lambda params: params["layers"] != 0,
}

_NAMES: dict[str, tuple[Value, ...]] = {
    "shape": SHAPES,
    "activation": known.ACTIVATIONS,
    "norm": known.NORMS,
    "init": known.INITS,
    "optimizer": known.OPTIMIZERS,
    "schedule": known.SCHEDULES,
    "loss": (*known.CLASS_LOSSES, *known.NUMBER_LOSSES),
    "scaling": SCALINGS,
    "expand": (False, True),
    "log_target": (False, True),
}
_WHOLE = {"layers": (0, _MOST_LAYERS), "width": (1, _WIDEST), "batch_size": (1, 2**20), "epochs": (1, 100_000)}
_BOUNDS = {
    "dropout": (0.0, 0.99), "lr": (1e-12, 1e3), "lr_decay": (1e-9, 1.0), "momentum": (0.0, 0.9999999),
    "beta1": (0.0, 0.9999999), "beta2": (0.0, 0.9999999999), "weight_decay": (0.0, 1e3), "l1": (0.0, 1e3),
    "label_smoothing": (0.0, 0.99), "periodic": (0.0, 100.0),
}  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """How columns and target become numbers, as far as it is searched: the part of a candidate no engine knows."""

    scaling: str = "standard"
    log_target: bool = False
    periodic: float = 0.0


class Space:
    """Every part of an MLP and its training that the search may choose, with defaults for any table.

    ``Space(lr=(1e-4, 1e-2), layers=[0, 1], optimizer="adam", dropout=Range(0, 0.5))``: a part is a value (fixed), a
    list (a choice), a pair (a range on the default's scale) or a Range or Choice; parts not named keep their default.
    ``Space.default()`` shows all of them. width is that of the first layer; shape: wide (all equal), tapered (each half
    of the one before) or funnel (each a quarter), never widening again, except that expand doubles the second layer.
    dropout is the rate of the last hidden layer, lower in proportion nearer the input. momentum and betas are drawn as
    1 - value on a logarithmic scale. periodic: 0, or the standard deviation of the frequencies of eight sines and
    cosines of every column of numbers that become inputs too. Raises ArgumentError naming the part, what it was and
    what it must be.
    """

    def __init__(self, parts: Mapping[str, Any] | None = None, /, **overrides: Any) -> None:
        given = {**(parts or {}), **overrides}
        for name in given:
            if name not in DEFAULTS:
                raise ArgumentError(f"Space: no part {name!r}{nearest(str(name), DEFAULTS)}")
        self.parts: dict[str, Part] = {
            name: read_part(name, given[name], default) if name in given else default
            for name, default in DEFAULTS.items()
        }
        self.given = frozenset(given)
        for name, part in self.parts.items():
            _check_values(name, part)

    @classmethod
    def default(cls) -> Space:
        """The space for any table."""
        return cls()

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Space:
        """Read a YAML file of parts, such as ``lr: {low: 1e-4, high: 1e-2}`` or ``layers: [0, 1]``."""
        yaml = require("yaml", "a space in a YAML file")
        source = Path(path)
        if not source.is_file():
            raise DataError(f"no such file: {source}")
        try:
            content = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{source} is no YAML file: {' '.join(str(error).split())}") from None
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise DataError(f"{source} must hold a mapping of parts to values, not a {type(content).__name__}")
        return cls(content)

    def to_plain(self) -> dict[str, Any]:
        """All parts as a YAML file would hold them; ``Space(space.to_plain())`` is the same space."""
        return {name: part.to_plain() for name, part in self.parts.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(tuple(self.parts.items()))

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{name}={part.to_plain()!r}' for name, part in self.parts.items())})"

    def with_parts(self, **parts: Part) -> Space:
        """A copy with some parts replaced."""
        copy = Space.__new__(Space)
        copy.parts, copy.given = {**self.parts, **parts}, self.given
        return copy

    def for_task(self, task: str, *, positive_target: bool = False, numeric: int = 1) -> Space:
        """What of the space applies: losses of the task, log_target for positive numbers only.

        numeric: columns of numbers; waves of none, or of very many, are left out unless they were asked for.
        """
        losses = known.CLASS_LOSSES if task == "classification" else known.NUMBER_LOSSES
        own = self.parts["loss"]
        kept = tuple(value for value in (own.values if isinstance(own, Choice) else ()) if value in losses)
        if not kept:
            raise ArgumentError(f"Space: part 'loss' has no loss for a {task}; there are {listed(losses)}")
        log = self.parts["log_target"]
        allowed = log if task == "regression" and positive_target else Choice((False,))
        if "log_target" in self.given and isinstance(log, Choice) and False not in log.values and allowed is not log:
            raise ArgumentError("Space: part 'log_target' is true, but that needs a regression with positive targets")
        waves = self.parts["periodic"]
        if "periodic" not in self.given and not 0 < numeric <= _MOST_WAVED:
            waves = Choice((0.0,))
        return self.with_parts(loss=Choice(kept), log_target=allowed, periodic=waves)

    def active(self, params: Mapping[str, Value]) -> list[str]:
        """Names of the parts that matter, given the others: no width without a hidden layer."""
        complete = dict(params)
        for name in ("layers", "schedule", "optimizer", "loss"):
            complete.setdefault(name, self.parts[name].from_unit(0.0))
        return [name for name in self.parts if name not in _CONDITIONS or _CONDITIONS[name](complete)]

    def reduce(self, params: Mapping[str, Value]) -> Params:
        """``params`` without those that do not matter, in the order of the parts."""
        return {name: params[name] for name in self.active(params) if name in params}

    def free(self) -> list[str]:
        """Names of the parts with something to choose."""
        return [name for name, part in self.parts.items() if not part.fixed]

    def at(self, unit: Mapping[str, float]) -> Params:
        """The candidate at a point of the unit cube; a coordinate that is missing counts as 0.5."""
        return self.reduce({name: part.from_unit(unit.get(name, 0.5)) for name, part in self.parts.items()})

    def holds(self, params: Mapping[str, Value]) -> bool:
        """True if the search could give this candidate: old trials are used again when it still could."""
        return all(name in self.parts and self.parts[name].holds(value) for name, value in params.items())

    def spec(self, params: Mapping[str, Value], base: Spec) -> tuple[Spec, Encoding]:
        """The member and the encoding a candidate stands for; what ``params`` does not name is ``base``'s."""
        names = {field.name for field in fields(Spec)}
        plain: dict[str, Any] = {name: value for name, value in params.items() if name in names}
        hidden = widths(params)
        dropout = float(params.get("dropout") or 0.0)
        plain["hidden"] = hidden
        plain["dropout"] = tuple(dropout * (index + 1) / len(hidden) for index in range(len(hidden))) or 0.0
        encoding = Encoding(
            str(params.get("scaling", "standard")), bool(params.get("log_target", False)),
            float(params.get("periodic") or 0.0),
        )  # fmt: skip
        return replace(base, **plain), encoding


def widths(params: Mapping[str, Value]) -> tuple[int, ...]:
    """Hidden layers of a candidate: (64, 32, 16) for 3 layers, width 64, tapered; (64, 128, 64) if it also expands."""
    layers, width = int(params.get("layers") or 0), int(params.get("width") or 0)
    divide = {"wide": 1, "tapered": 2, "funnel": 4}[str(params.get("shape", "wide"))]
    hidden = [width] if layers else []
    while len(hidden) < layers:
        grow = len(hidden) == 1 and bool(params.get("expand"))
        following = hidden[-1] * 2 if grow else max(min(hidden[-1], _NARROWEST), hidden[-1] // divide)
        hidden.append(following)
    return tuple(hidden)


def _check_values(name: str, part: Part) -> None:
    if name in _NAMES:
        if isinstance(part, Range):
            raise ArgumentError(f"Space: part {name!r} is a range; it must be among {listed(_NAMES[name])}")
        for value in part.values:
            if not any(value is item or (isinstance(item, str) and value == item) for item in _NAMES[name]):
                raise ArgumentError(f"Space: part {name!r} holds {value!r}; it must be among {listed(_NAMES[name])}")
        return
    low, high = _WHOLE.get(name) or _BOUNDS[name]
    ends = (part.low, part.high) if isinstance(part, Range) else part.values
    for value in ends:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= float(value or 0) <= high:
            raise ArgumentError(f"Space: part {name!r} holds {value!r}; it must be a number from {low:g} to {high:g}")
    if name in _WHOLE:
        whole = part.whole or part.fixed if isinstance(part, Range) else True
        if not whole or any(float(value or 0) != int(value or 0) for value in ends):
            raise ArgumentError(f"Space: part {name!r} must hold whole numbers; say whole for a range")
