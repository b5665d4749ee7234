"""What a member's training has come to, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Mark:
    """A change of a member's recipe: made after ``epoch`` epochs."""

    epoch: int
    changes: dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """Learning curves of one member, one entry an epoch, and how its training stands.

    train_loss: mean over the rows of the steps that were taken, with dropout, before each step; NaN where none was.
    validation_loss, metric: after the epoch, NaN where nothing is validated. lr: of the epoch's last step. best_epoch:
    counted from 0, None before there is one; best: its metric. status: "alive", "epochs" (all done), "patience",
    "diverged" or "dropped". cause, stopped_step: of divergence. skipped: steps that were not taken since something in
    them was not finite. seconds: what its threads spent on it. marks: changes by ``Population.set``.
    """

    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    metric: tuple[float, ...]
    lr: tuple[float, ...]
    best_epoch: int | None
    best: float | None
    status: str
    cause: str
    stopped_step: int | None
    steps: int
    skipped: int
    seconds: float = field(compare=False, repr=False)  # says nothing of what was learnt
    marks: tuple[Mark, ...]

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.train_loss)
