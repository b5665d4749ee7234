"""What a training says while it goes on: one live line on a terminal, nothing elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Watch:
    """Told how far the training is, ten times a second; this one says nothing."""

    def update(self, steps: int, running: int, stopped: int, share: float, best: float) -> None:
        """Ignored."""


class Live(Watch):
    """Members that go on and that stopped, the best metric, steps a second and the time left."""

    def __init__(self, members: int, metric: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.metric = metric
        self.began = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f} %"))
        self.bar: Any = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5)
        self.task = self.bar.add_task(f"{members} members", total=1.0)

    def update(self, steps: int, running: int, stopped: int, share: float, best: float) -> None:
        """The line anew."""
        text = line(self.metric, time.perf_counter() - self.began, steps, running, stopped, share, best)
        self.bar.update(self.task, completed=share, description=text)


def line(metric: str, seconds: float, steps: int, running: int, stopped: int, share: float, best: float) -> str:
    """The state of a training in one line of text."""
    parts = [f"{running} alive, {stopped} dropped"]
    if math.isfinite(best):
        parts.append(f"best {metric} {best:.4g}")
    parts.append(f"{steps / max(seconds, 1e-9):,.0f} steps/s")
    if share > 0:
        parts.append(f"{duration(seconds * (1 - share) / share)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Minutes and seconds, hours where there are any: "1:05:09"."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


@contextmanager
def watching(show: bool, members: int, metric: str) -> Iterator[Watch]:
    """A live line where it is wanted and stderr is a terminal."""
    if not show or not sys.stderr.isatty():
        yield Watch()
        return
    watch = Live(members, metric)
    with watch.bar:
        yield watch
