"""What a run says while it works: a live bar on a terminal, plain lines in a pipe, nothing if not wanted."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from mlpkit.tune.ladder import Trial, in_words
from mlpkit.tune.trainer import Outcome


class Silent:
    """Told what happens, in order, and says nothing; a context manager around the search. Base of the others."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def note(self, text: str) -> None:
        """Ignored."""

    def start(self, hidden: tuple[int, ...]) -> None:
        """Ignored."""

    def fold(self, outcome: Outcome) -> None:
        """Ignored."""

    def done(self, trial: Trial) -> None:
        """Ignored."""


class Plain(Silent):
    """One line per candidate on stderr."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def note(self, text: str) -> None:
        """The sentence as a line."""
        print(text, file=sys.stderr, flush=True)

    def done(self, trial: Trial) -> None:
        """Score, spread and cost of the candidate."""
        self.note(line(trial, self.metric))


class Live(Plain):
    """A line per finished candidate above a bar that counts the folds of the present one."""

    def __init__(self, metric: str, folds: int) -> None:
        super().__init__(metric)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("folds"),
            TimeElapsedColumn(),
        )  # fmt: skip
        self._bar: Any = Bar(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5)
        self._task = self._bar.add_task("preparing", total=folds)

    def __enter__(self) -> Live:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """The sentence above the bar."""
        self._bar.console.print(text, highlight=False, markup=False)

    def start(self, hidden: tuple[int, ...]) -> None:
        """The bar starts again for this candidate."""
        self._bar.reset(self._task, description=in_words(hidden))

    def fold(self, outcome: Outcome) -> None:
        """One fold further."""
        self._bar.advance(self._task)


def choose(show: bool | None, metric: str, folds: int) -> Silent:
    """show False: silent. Otherwise live on a terminal, plain lines elsewhere."""
    if show is False:
        return Silent()
    return Live(metric, folds) if sys.stderr.isatty() else Plain(metric)


def line(trial: Trial, metric: str) -> str:
    """One candidate in one line of text."""
    if trial.state != "complete":
        return f"  {trial.name:<8} {trial.state} after {trial.seconds:.1f} s"
    return f"  {trial.name:<8} {metric} {trial.mean:.4f} ± {trial.se:.4f}   {trial.seconds:5.1f} s"
