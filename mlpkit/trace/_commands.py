"""The command ``mlpkit trace``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlpkit.errors import ArgumentError
from mlpkit.trace._runner import run


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, no_args_is_help=True
)
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module's name, as in python -m.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    show_default="the current folder",
    help="Where diagnosis.json and report.html go.",
)
@click.option("--level", type=click.Choice(["observe"]), default="observe", show_default=True, help="How much is seen.")
@click.option(
    "--fail-on",
    type=click.Choice(["never", "failure"]),
    default="never",
    show_default=True,
    help="Exit 3 on a failure.",
)
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def trace(module: bool, out: Path, level: str, fail_on: str, script: str, arguments: tuple[str, ...]) -> None:
    """Run SCRIPT, unmodified, and explain the first NaN or Inf that matters.

    Options come before SCRIPT; all that follows it is the script's own. The exit code is the script's own, or 3
    with --fail-on failure when a failure was found.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"trace: --out {str(out)!r} is a file, must be a folder")
    outcome = run(script, arguments, module=module, out=out)
    diagnosis = outcome.tracer.diagnosis
    click.echo(f"mlpkit: {diagnosis.sentence}", err=True)
    click.echo(f"mlpkit: {outcome.report or outcome.note}; {outcome.diagnosis}", err=True)
    failed = fail_on == "failure" and diagnosis.verdict == "failure"
    sys.exit(3 if failed else outcome.code)
