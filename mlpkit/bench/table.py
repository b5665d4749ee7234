"""What a run prints: a table that grows on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from mlpkit.bench.case import OURS


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """family, sizes, pass, dtype, our time, ratios, share of the floor: the columns of both forms."""
    clock = row["clock"]
    ours = row["seconds"][OURS][clock]
    times = f"{microseconds(ours['median'])} ({microseconds(ours['minimum'])})"
    ratios = ", ".join(f"{name} {ratio[clock]['median']:.2f}x" for name, ratio in row["ratio"].items())
    if "of_probe" in row:
        ratios = f"gains {row['gain']:.2f}x where the probe gains {row['probe_gain']:.2f}x"
    path = row.get("about", {}).get(OURS)
    ratios = "; ".join(filter(None, [ratios, row["note"], path and f"{path} path"]))
    share = f"{100 * row['floor']['share']:.0f} %" if "floor" in row else "-"
    return row["family"], row["label"], row["what"], row["dtype"], times, ratios, share


def microseconds(seconds: float) -> str:
    """Three digits or more, in microseconds."""
    value = seconds * 1e6
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def heading(facts: dict[str, Any]) -> str:
    """The conditions in one line."""
    threads = f"{facts['threads']} thread" + ("s" if facts["threads"] > 1 else "")
    where = f"{facts['cpu']} ({facts['cpu_capability']}), {threads}, torch {facts['torch']}"
    times = f"our {facts['clock']} time in us, median (minimum) of {facts['rounds']} interleaved rounds"
    return f"{where}: {times}; the rivals' time over ours; floor over ours"


class Plain:
    """One line a row on stdout."""

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def begin(self, facts: dict[str, Any]) -> None:
        """The conditions, before the first row."""
        print(heading(facts), flush=True)

    def row(self, row: dict[str, Any]) -> None:
        """One finished case."""
        family, label, what, dtype, times, ratios, share = cells(row)
        print(
            f"{family:<8}{label:<38}{what:<20}{dtype:<6}{times:>22} us  floor {share:>5}  {ratios}".rstrip(), flush=True
        )


class Live(Plain):
    """A table that is drawn anew after each row, and never while something is timed."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as Screen
        from rich.table import Table

        self._table = Table(box=None, header_style="bold")
        for name in ("case", "sizes", "pass", "dtype", "us (minimum)", "rivals' time over ours", "of floor"):
            self._table.add_column(name, justify="right" if name in ("us (minimum)", "of floor") else "left")
        self._screen = Screen(self._table, console=Console(), auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> Live:
        self._screen.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._screen.__exit__(kind, error, tb)

    def begin(self, facts: dict[str, Any]) -> None:
        """The conditions, above the table."""
        self._screen.console.print(heading(facts), highlight=False, markup=False)

    def row(self, row: dict[str, Any]) -> None:
        """One row more."""
        from rich.text import Text

        self._table.add_row(*(Text(cell) for cell in cells(row)))
        self._screen.refresh()


def choose() -> Plain:
    """Live on a terminal, plain lines elsewhere."""
    return Live() if sys.stdout.isatty() else Plain()
