"""The commands ``mlpkit trace`` and ``mlpkit replay``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from mlpkit.errors import MissingExtraError
from mlpkit.report._files import check_folder
from mlpkit.trace._runner import FAILED, run


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, no_args_is_help=True
)
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module's name, as in python -m.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("."),
    show_default="the current folder",
    help="Where diagnosis.json, report.html and bundle.mlpk go.",
)
@click.option(
    "--level",
    type=click.Choice(["observe", "watch"]),
    default="observe",
    show_default=True,
    help="Every operation, or module outputs, gradients and parameters once a step.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["never", "failure"]),
    default="never",
    show_default=True,
    help="Exit 3 on a failure.",
)
@click.option(
    "--stop-at-first",
    is_flag=True,
    help="End SCRIPT, as Ctrl-C does, after the first step with a failure, and exit 3.",
)
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def trace(
    module: bool, out: Path, level: str, fail_on: str, stop_at_first: bool, script: str, arguments: tuple[str, ...]
) -> None:
    """Run SCRIPT, unmodified, and explain the first NaN or Inf that matters.

    Options come before SCRIPT; all that follows it is the script's own. The exit code is the script's own, or 3
    with --fail-on failure when a failure was found, and where --stop-at-first ended it.
    """
    check_folder(out, "trace: --out")
    # One of several processes, as torchrun starts them: each has a folder of its own, and says who it is.
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    who = "mlpkit" if rank is None else f"mlpkit, rank {rank}"
    if rank is not None:
        out = out / f"rank{int(rank)}"
        out.mkdir(parents=True, exist_ok=True)
    # The program may change directory; what was asked for is meant from here.
    folder = Path.cwd() / out
    outcome = run(script, arguments, module=module, level=level, stop_at_first=stop_at_first)
    diagnosis = outcome.tracer.diagnosis
    click.echo(f"{who}: {diagnosis.sentence}", err=True)
    outcome.tracer.write_json(folder / "diagnosis.json")
    extras = [
        _written(lambda: outcome.tracer.report(folder / "report.html"), out / "report.html"),
        str(out / "diagnosis.json"),
        _written(lambda: outcome.tracer.bundle(folder / "bundle.mlpk"), out / "bundle.mlpk"),
    ]
    click.echo(f"{who}: {'; '.join(name for name in extras if name)}", err=True)
    failed = fail_on == "failure" and diagnosis.verdict == "failure"
    sys.exit(FAILED if failed else outcome.code)


def _written(write: Callable[[], Path | None], path: Path) -> str:
    """The file that was written, the extra that it needs, or nothing."""
    try:
        return str(path) if write() is not None else ""
    except MissingExtraError as error:
        return str(error)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def replay(bundle: Path) -> None:
    """Run the first bad operation of a traced run again, from BUNDLE alone, without the script.

    Exits 1 where the result is not the recorded one, bit for bit. Runs no code from the file.
    """
    from mlpkit.trace._replay import replay as run_again

    found = run_again(bundle)
    if found.recorded:
        click.echo(f"recorded: {found.recorded}")
    click.echo(f"replayed: {found}")
    sys.exit(0 if found.same else 1)
