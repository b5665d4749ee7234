"""The command ``mlpkit trace``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlpkit.errors import MissingExtraError
from mlpkit.report._files import check_folder
from mlpkit.trace._runner import run


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, no_args_is_help=True
)
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module's name, as in python -m.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
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
    check_folder(out, "trace: --out")
    # The program may change directory; what was asked for is meant from here.
    folder = Path.cwd() / out
    outcome = run(script, arguments, module=module, level=level)
    diagnosis = outcome.tracer.diagnosis
    click.echo(f"mlpkit: {diagnosis.sentence}", err=True)
    outcome.tracer.write_json(folder / "diagnosis.json")
    try:
        outcome.tracer.report(folder / "report.html")
        report = str(out / "report.html")
    except MissingExtraError as error:
        report = str(error)
    click.echo(f"mlpkit: {report}; {out / 'diagnosis.json'}", err=True)
    failed = fail_on == "failure" and diagnosis.verdict == "failure"
    sys.exit(3 if failed else outcome.code)
