"""What a caller may ask to follow a skip; see ``guard.aftermath`` for who does it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlpkit.errors import ArgumentError

ON_NONFINITE = ("skip", "raise", "rollback")
ON_COLLAPSE = ("skip", "raise", "fp32_step")


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

    def check_precision(self, precision: str) -> None:
        """Raises ArgumentError when a step in float32 is asked for where every step is."""
        if self.on_collapse == "fp32_step" and precision == "fp32":
            raise ArgumentError(f"{self.owner}: on_collapse='fp32_step' wants precision 'fp16' or 'bf16', not 'fp32'")
