"""What follows a skip: nothing, an error, or the way back to the last good snapshot; and an end to skips in a row."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.snapshot import Run, Snapshot

ON_NONFINITE = ("skip", "raise", "rollback")
ON_COLLAPSE = ("skip", "raise", "fp32_step")
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Policy:
    """The host's part of a guarded step; what the arguments of ``TrainStep`` of these names mean.

    Raises ArgumentError naming the argument, what it was and what it must be; ``owner`` begins the sentence.
    """

    owner: str
    on_nonfinite: str = "skip"
    on_collapse: str = "skip"
    max_consecutive_skips: int | None = None
    check_every: int = 1
    snapshot_every: int = 100
    snapshot_path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, known in (("on_nonfinite", ON_NONFINITE), ("on_collapse", ON_COLLAPSE)):
            value = getattr(self, name)
            if value not in known:
                raise ArgumentError(f"{self.owner}: {name} is {value!r}; it must be one of {', '.join(known)}")
        for name in ("max_consecutive_skips", "check_every", "snapshot_every"):
            value = getattr(self, name)
            if value is None and name == "max_consecutive_skips":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{self.owner}: {name} is {value!r}; it must be an int of at least 1")
        if self.snapshot_path is not None and not isinstance(self.snapshot_path, (str, os.PathLike)):
            raise ArgumentError(f"{self.owner}: snapshot_path is {self.snapshot_path!r}; it must be a path or None")

    @property
    def snapshots(self) -> bool:
        """Whether snapshots are taken: to roll back to, or because a path was given."""
        return self.on_nonfinite == "rollback" or self.snapshot_path is not None


class Keeper:
    """The last good snapshot of a run: in memory, or in a file where there is a path; taken every N steps."""

    def __init__(self, policy: Policy, path: Path | None) -> None:
        self._every, self._path = policy.snapshot_every, path
        self._kept: Snapshot | None = None
        self.step: int | None = None  # of the last good one
        self._next = 0

    def offer(self, run: Run, steps: int) -> None:
        """Take a snapshot if one is due and the run is finite."""
        if steps < self._next:
            return
        snapshot = Snapshot.take(run)
        if not snapshot.finite:
            return
        self._next = steps + self._every
        self.step = snapshot.step
        if self._path is None:
            self._kept = snapshot
        else:
            snapshot.save(self._path)

    def back(self, run: Run) -> int:
        """Restore the last good snapshot, counters and scale aside; returns its step."""
        if self.step is None:
            raise NonFiniteError("TrainStep: there is no good snapshot to roll back to")
        snapshot = self._kept if self._path is None else Snapshot.load(self._path)
        assert snapshot is not None
        snapshot.restore(run, counters=False)
        return snapshot.step


class Follower:
    """Counts skips in a row, and acts on them every ``check_every`` steps."""

    def __init__(self, policy: Policy, back: Callable[[], int] | None = None) -> None:
        self.policy = policy
        self.consecutive = 0
        self._back = back
        self._row: list[SkipRecord] = []
        self._pending: list[SkipRecord] = []

    def follow(self, steps: int, record: SkipRecord | None) -> SkipRecord | None:
        """After each step; returns the record with what was done. Raises NonFiniteError where the policy says so.

        steps: how many there were. The error's ``records`` are the skips it is about.
        """
        if record is None or record.taken:
            self.consecutive, self._row = 0, []
            if not self._pending:
                return record
        else:
            self.consecutive += 1
            self._row = [*self._row, record][-_MOST_SHOWN:]
            self._pending.append(record)
        if steps % self.policy.check_every:
            return record
        pending, self._pending = self._pending, []
        return self._act(pending, record)

    def _act(self, pending: list[SkipRecord], record: SkipRecord | None) -> SkipRecord | None:
        policy = self.policy
        if pending and policy.on_nonfinite == "raise":
            raise NonFiniteError(str(pending[0]), pending)
        for one in pending:
            if one.nature == "collapse" and policy.on_collapse == "raise":
                raise NonFiniteError(f"{one} The forward itself held it: no loss scale can help.", pending)
        if policy.max_consecutive_skips is not None and self.consecutive >= policy.max_consecutive_skips:
            shown = "; ".join(str(one) for one in self._row)
            raise NonFiniteError(
                f"{policy.owner}: {self.consecutive} steps in a row were skipped (max_consecutive_skips="
                f"{policy.max_consecutive_skips}); the last: {shown}",
                self._row,
            )
        if pending and policy.on_nonfinite == "rollback" and self._back is not None:
            # Calibration is the scale's to cure: every run begins with some.
            if all(one.nature == "calibration" for one in pending):
                return record
            step = self._back()
            return replace(record, action=f"rollback to step {step}") if record is not None else None
        return record
