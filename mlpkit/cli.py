"""The ``mlpkit`` command: each area brings its commands in ``<area>/_commands.py``, imported on first use."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from mlpkit.errors import MlpkitError

_COMMANDS = {
    "bench": "mlpkit.bench._commands",
    "compare": "mlpkit.tune._commands",
    "predict": "mlpkit.tune._commands",
    "replay": "mlpkit.trace._commands",
    "report": "mlpkit.tune._commands",
    "trace": "mlpkit.trace._commands",
    "tune": "mlpkit.tune._commands",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlpkit")
def cli() -> None:
    """Fast, safe, explained and tuned multi-layer perceptrons for PyTorch."""


def main() -> None:
    """Run the command line; an mlpkit error becomes one sentence on stderr and exit code 2."""
    try:
        cli()
    except MlpkitError as error:
        click.echo(f"mlpkit: {error}", err=True)
        sys.exit(2)
