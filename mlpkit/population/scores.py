"""What a member's training has come to, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpkit.population.member import Member

SHOWN = 10  # rows of a leaderboard


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


def leaderboard(
    members: Mapping[int, Member], scores: Mapping[int, Scores], ranking: Sequence[int], metric: str
) -> str:
    """The first members of a ranking (those that are not validated after them) as lines of text."""
    order = [*ranking, *(index for index in members if index not in set(ranking))]
    rows = [("id", "hidden", "activation", "lr", metric, "epochs", "status")]
    for index in order[:SHOWN]:
        member, score = members[index], scores[index]
        best = "-" if score.best is None else f"{score.best:.4g}"
        hidden = "-".join(map(str, member.hidden)) or "linear"
        rows.append((str(index), hidden, member.activation, f"{member.lr:.3g}", best, str(score.epochs), score.status))
    sizes = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes)).rstrip() for row in rows]
    left = len(order) - SHOWN
    return "\n".join([*lines, *([f"and {left} more"] if left > 0 else [])])
