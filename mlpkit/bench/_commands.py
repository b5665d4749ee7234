"""The command ``mlpkit bench``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlpkit.bench import cases, machine, table
from mlpkit.bench.case import DTYPES, Settings, Sizes
from mlpkit.bench.page import page as html_page
from mlpkit.bench.runner import run, write
from mlpkit.errors import ArgumentError
from mlpkit.report import write_whole
from mlpkit.report._extras import require

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
@click.option(
    "--sizes",
    multiple=True,
    metavar="SIZES",
    help="Your own: 512x784-300 is 512 rows through a layer 784 -> 300, 64x784-512-512-10 a training step on 64. "
    "Can be given again.",
)
@click.option("--page", type=click.Path(path_type=Path), default=None, metavar="FILE", help="HTML page to write.")
@click.option("--compile", "compiles", is_flag=True, help="Add torch.compile as a rival (half a minute a row).")
@click.option("--quick", is_flag=True, help="Tiny sizes, few rounds: shows that all runs; no figures to quote.")
def bench(
    case: tuple[str, ...],
    listing: bool,
    threads: int,
    rounds: int,
    out: Path | None,
    dtypes: str,
    sizes: tuple[str, ...],
    page: Path | None,
    compiles: bool,
    quick: bool,
) -> None:
    """Measure mlpkit beside its rivals on this machine: every CASE, or those named.

    Each row gives our time, how many times longer each rival took in the same interleaved rounds, and which share of
    the floor we reach: the matrix products at the machine's peak, which a probe measures in the same run.
    """
    own = tuple(Sizes.read(text) for text in sizes)
    names = _fitting(cases.chosen(case), own, named=bool(case)) if own else cases.chosen(case)
    if listing:
        for name in names:
            click.echo(f"{name:<9} {cases.purpose(name)}")
        return
    chosen = _dtypes(dtypes)
    _check_numbers(threads, rounds, quick)
    _check_file("--out", out)
    _check_file("--page", page)
    settings = Settings(threads, rounds, chosen, compiles, sizes=own)
    if quick:
        settings = replace(settings, rounds=min(rounds, 2), quick=True, seconds_a_round=0.0)
    if page is not None:
        for module in ("jinja2", "plotly.offline"):
            require(module, "mlpkit bench --page", "report")
    results = _measure(names, settings)
    if out is not None:
        write(results, out)
        click.echo(f"wrote {out}", err=True)
    if page is not None:
        write_whole(page, html_page(results))
        click.echo(f"wrote {page}", err=True)


def _fitting(names: list[str], own: tuple[Sizes, ...], *, named: bool) -> list[str]:
    fitting = {sizes.family for sizes in own}
    left = [name for name in names if name not in fitting]
    if named and left:
        raise ArgumentError(
            f"bench: no --sizes fits the case {left[0]!r}; those given are sizes of {' and '.join(sorted(fitting))}"
        )
    return [name for name in names if name in fitting]


def _measure(names: list[str], settings: Settings) -> dict[str, Any]:
    with table.choose() as view:
        view.begin(machine.environment(settings))
        results = run(names, settings, view.row)
    for reason in results["skipped"]:
        click.echo(f"skipped: {reason}", err=True)
    click.echo(f"{len(results['cases'])} rows in {results['environment']['seconds']:.0f} s", err=True)
    return results


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


def _check_file(option: str, path: Path | None) -> None:
    # Now rather than after ten minutes of measuring.
    if path is None:
        return
    if path.is_dir():
        raise ArgumentError(f"bench: {option} {path} is a directory; it must be a file")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"bench: {option} {path} cannot be written: {error.strerror}") from error
