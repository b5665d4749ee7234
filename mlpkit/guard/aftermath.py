"""What follows a step: nothing, an error, a snapshot, the way back to the last good one; an end to skips in a row."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from mlpkit.errors import NonFiniteError
from mlpkit.guard.policy import Policy
from mlpkit.guard.ranks import Ranks
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.snapshot import Run, Snapshot, rank_path

_MOST_SHOWN = 5


class Keeper:
    """The last good snapshot of a run: in memory, or in a file where there is a path; taken every N steps."""

    def __init__(self, policy: Policy, run: Run, ranks: Ranks, sentinels: Collection[str]) -> None:
        self._every, self._run, self._ranks = policy.snapshot_every, run, ranks
        self._sentinels = sentinels
        self._path = policy.snapshot_path and rank_path(policy.snapshot_path, ranks.rank, ranks.size)
        self._kept: Snapshot | None = None
        self.step: int | None = None  # of the last good one
        self._next = 0

    def offer(self, steps: int) -> None:
        """Take a snapshot if one is due and the run is finite."""
        if self.step is not None and self.step <= steps < self._next:
            return
        snapshot = Snapshot.take(self._run)
        if self._ranks.decide(not snapshot.finite_but_for(self._sentinels)):
            return
        if self._path is None:
            self._kept = snapshot
        else:
            # All ranks' files appear together, or as close to that as renaming is.
            snapshot.save(self._path, before_it_appears=self._ranks.wait)
        self.step, self._next = steps, steps + self._every

    def back(self) -> int:
        """Restore the last good snapshot, counters and scale aside; returns its step."""
        snapshot = self._kept if self._path is None else Snapshot.load(self._path)
        assert snapshot is not None
        snapshot.restore(self._run, counters=False)
        return snapshot.step


class Follower:
    """Counts skips in a row, and acts on them every ``check_every`` steps."""

    def __init__(self, policy: Policy, keeper: Keeper | None = None) -> None:
        self.policy = policy
        self.consecutive = 0
        self._keeper = keeper
        self._row: list[SkipRecord] = []
        self._longest: list[SkipRecord] = []  # the last of the longest row since the last check
        self._length = 0  # of that row
        self._pending: list[SkipRecord] = []

    @property
    def awake(self) -> bool:
        """Whether the next taken step makes a difference."""
        return bool(self.consecutive or self._pending)

    def follow(self, steps: int, record: SkipRecord | None) -> tuple[SkipRecord, SkipRecord] | None:
        """After each step; returns the last skip's record, as it was and with what was done, if anything was.

        steps: how many there were. Raises NonFiniteError where the policy says so, or where there is no good snapshot
        to go back to; its ``records`` are the skips it is about.
        """
        if record is None or record.taken:
            self.consecutive, self._row = 0, []
        else:
            self.consecutive += 1
            self._row = [*self._row, record][-_MOST_SHOWN:]
            self._pending.append(record)
            if self.consecutive > self._length:
                self._length, self._longest = self.consecutive, self._row
        if not self._pending or steps % self.policy.check_every:
            return None
        pending, self._pending = self._pending, []
        length, self._length = self._length, 0
        self._raise(pending, length)
        if self._keeper is None or self.policy.on_nonfinite != "rollback":
            return None
        # Calibration is the scale's to cure: every fp16 run begins with some.
        if all(one.nature == "calibration" for one in pending):
            return None
        if self._keeper.step is None:
            raise NonFiniteError(f"{pending[-1]} There is no good snapshot of this run to go back to.", pending)
        step = self._keeper.back()
        return pending[-1], replace(pending[-1], action=f"rollback to step {step}")

    def _raise(self, pending: list[SkipRecord], length: int) -> None:
        policy = self.policy
        if policy.on_nonfinite == "raise":
            raise NonFiniteError(str(pending[0]), pending)
        for one in pending:
            if one.nature == "collapse" and policy.on_collapse == "raise":
                raise NonFiniteError(f"{one} The forward itself held it: no loss scale can help.", pending)
        if policy.max_consecutive_skips is not None and length >= policy.max_consecutive_skips:
            shown = "; ".join(str(one) for one in self._longest)
            raise NonFiniteError(
                f"{policy.owner}: {length} steps in a row were skipped (max_consecutive_skips="
                f"{policy.max_consecutive_skips}); the last: {shown}",
                self._longest,
            )


class Aftermath:
    """The policies of a ``TrainStep``: asked before each step where it ``keeps`` snapshots, and after each.

    sentinels: names of buffers that hold Inf on purpose.
    """

    def __init__(self, policy: Policy, run: Run, ranks: Ranks, sentinels: Collection[str]) -> None:
        self.policy = policy
        self._keeper = Keeper(policy, run, ranks, sentinels) if policy.snapshots else None
        self._follower = Follower(policy, self._keeper)
        self.keeps = policy.snapshots
        self.awake = False  # whether the last skip is still to be acted on, or counted

    @property
    def consecutive(self) -> int:
        """Skips in a row so far."""
        return self._follower.consecutive

    @consecutive.setter
    def consecutive(self, count: int) -> None:
        self._follower.consecutive = count
        self.awake = self._follower.awake

    @property
    def can_go_back(self) -> bool:
        """Whether bad state can be healed: by a good snapshot."""
        return self.policy.on_nonfinite == "rollback" and self._keeper is not None and self._keeper.step is not None

    def wants_fp32(self, record: SkipRecord) -> bool:
        """Whether this skip is to be tried again in float32."""
        return self.policy.on_collapse == "fp32_step" and record.nature == "collapse"

    def before(self, steps: int) -> None:
        """A step begins."""
        if self._keeper is not None:
            self._keeper.offer(steps)

    def after(self, steps: int, record: SkipRecord | None) -> tuple[SkipRecord, SkipRecord] | None:
        """A step has ended; as ``Follower.follow``. Of a taken step it need be told only while ``awake``."""
        try:
            return self._follower.follow(steps, record)
        finally:
            self.awake = self._follower.awake
