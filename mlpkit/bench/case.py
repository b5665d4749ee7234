"""What a case is: the calls that are timed beside each other, and the facts that name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

OURS = "mlpkit"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Seconds of one call by clock ("wall", "cpu"), one entry a round, for every rival.
Times = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Settings:
    """What the command line decides. quick: tiny sizes and few rounds, to see that everything runs."""

    threads: int = 1
    rounds: int = 9
    dtypes: tuple[str, ...] = tuple(DTYPES)
    compile: bool = False
    quick: bool = False
    seconds_a_round: float = 0.1

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
    sizes: dict[str, int]
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
