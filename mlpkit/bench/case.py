"""What a case is: the calls that are timed beside each other, and the facts that name them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mlpkit.errors import ArgumentError

OURS = "mlpkit"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Seconds of one call by clock ("wall", "cpu"), one entry a round, for every rival.
Times = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Sizes:
    """A user's own network or layer: rows of a batch, and the widths from the inputs to the outputs."""

    rows: int
    widths: tuple[int, ...]

    @property
    def family(self) -> str:
        """Which cases can be measured in these sizes."""
        return "layer" if len(self.widths) == 2 else "step"

    @staticmethod
    def read(text: str) -> Sizes:
        """``64x784-512-10``; raises ArgumentError for anything else."""
        if re.fullmatch(r"[1-9]\d*x[1-9]\d*(-[1-9]\d*)+", text) is None:
            raise ArgumentError(
                f"bench: --sizes is {text!r}; it must be rows, x, and two or more widths, as in 512x784-300 or "
                "64x784-512-512-10"
            )
        rows, widths = text.split("x")
        return Sizes(int(rows), tuple(int(width) for width in widths.split("-")))


@dataclass(frozen=True)
class Settings:
    """What the command line decides. quick: tiny sizes and few rounds, to see that everything runs.

    sizes: take the place of the own ones of ``layer`` (two widths) and of ``step`` (three or more).
    """

    threads: int = 1
    rounds: int = 9
    dtypes: tuple[str, ...] = tuple(DTYPES)
    compile: bool = False
    quick: bool = False
    seconds_a_round: float = 0.1
    sizes: tuple[Sizes, ...] = ()

    @property
    def clock(self) -> str:
        """The clock that ratios are read from: CPU time of one thread leaves the neighbours out, of many it lies."""
        return "cpu" if self.threads == 1 else "wall"


@dataclass(frozen=True)
class Rival:
    """One timed call. threads: how many it runs on, where that is not the run's own number.

    about: says after the measurement which way the call went, where it has several.
    """

    call: Callable[[], object]
    threads: int | None = None
    about: Callable[[], str] | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    label: the sizes in words. work: floating-point operations of one call's matrix products, 0 where there are none
    to speak of. build: makes the data and the rivals by name, ``OURS`` among them. baseline: the rival that tables
    compare with. threads and clock: overrule the run's own. beside: rivals that ratios say nothing about.
    derive: further numbers made of the times. note: what a reader must know to judge the row.
    """

    family: str
    label: str
    sizes: dict[str, int | list[int]]
    what: str
    dtype: str
    work: float
    build: Callable[[], dict[str, Rival]]
    baseline: str = "eager"
    threads: int | None = None
    clock: str | None = None
    beside: tuple[str, ...] = ()
    derive: Callable[[Times], dict[str, float]] | None = None
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """The part of a row that is known before it is measured."""
        names = ("family", "label", "sizes", "what", "dtype", "work", "baseline", "note")
        return {name: getattr(self, name) for name in names}
