"""The command ``mlpkit bench``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mlpkit.bench import cases, machine, table
from mlpkit.bench.case import DTYPES, Settings
from mlpkit.bench.runner import run, write
from mlpkit.errors import ArgumentError

FEWEST_ROUNDS = 7


@click.command()
@click.argument("case", nargs=-1)
@click.option("--list", "listing", is_flag=True, help="Name the cases and what they measure, and stop.")
@click.option("--threads", type=int, default=1, show_default=True, metavar="N", help="Threads of all rivals.")
@click.option("--rounds", type=int, default=9, show_default=True, metavar="N", help="Interleaved rounds, at least 7.")
@click.option("--out", type=click.Path(path_type=Path), default=None, metavar="FILE", help="JSON file to write.")
@click.option(
    "--dtypes", default=",".join(DTYPES), show_default=True, metavar="NAMES", help="Which, separated by commas."
)
@click.option("--compile", "compiles", is_flag=True, help="Add torch.compile as a rival (half a minute a row).")
@click.option("--quick", is_flag=True, help="Tiny sizes, few rounds: shows that all runs; no figures to quote.")
def bench(
    case: tuple[str, ...],
    listing: bool,
    threads: int,
    rounds: int,
    out: Path | None,
    dtypes: str,
    compiles: bool,
    quick: bool,
) -> None:
    """Measure mlpkit beside its rivals on this machine: every CASE, or those named.

    Each row gives our time, how many times longer each rival took in the same interleaved rounds, and which share of
    the floor we reach: the matrix products at the machine's peak, which a probe measures in the same run.
    """
    names = cases.chosen(case)
    if listing:
        for name in names:
            click.echo(f"{name:<9} {cases.purpose(name)}")
        return
    chosen = _dtypes(dtypes)
    _check_numbers(threads, rounds, quick)
    _check_out(out)
    settings = Settings(threads, rounds, chosen, compiles)
    if quick:
        settings = Settings(threads, min(rounds, 2), chosen, compiles, quick=True, seconds_a_round=0.0)
    _measure(names, settings, out)


def _measure(names: list[str], settings: Settings, out: Path | None) -> None:
    with table.choose() as view:
        view.begin(machine.environment(settings))
        results = run(names, settings, view.row)
    for reason in results["skipped"]:
        click.echo(f"skipped: {reason}", err=True)
    click.echo(f"{len(results['cases'])} rows in {results['environment']['seconds']:.0f} s", err=True)
    if out is not None:
        write(results, out)
        click.echo(f"wrote {out}", err=True)


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in DTYPES:
            raise ArgumentError(f"bench: --dtypes holds {name!r}; it must be of {', '.join(DTYPES)}")
    return names


def _check_numbers(threads: int, rounds: int, quick: bool) -> None:
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise ArgumentError(f"bench: --threads is {threads}; it must lie in [1, {cores}], this machine's cores")
    if rounds < (1 if quick else FEWEST_ROUNDS):
        raise ArgumentError(f"bench: --rounds is {rounds}; it must be at least {1 if quick else FEWEST_ROUNDS}")


def _check_out(out: Path | None) -> None:
    # Now rather than after ten minutes of measuring.
    if out is None:
        return
    if out.is_dir():
        raise ArgumentError(f"bench: --out {out} is a directory; it must be a file")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"bench: --out {out} cannot be written: {error.strerror}") from error
