"""``mlpkit tune`` and ``mlpkit predict``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlpkit.errors import ArgumentError

if TYPE_CHECKING:
    from mlpkit.tune.run import Run


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="Column to predict.")
@click.option("--task", type=click.Choice(["auto", "classification", "regression"]), default="auto", show_default=True)
@click.option("--strategy", default="auto", show_default=True, help="auto or constructive: the ladder of layers.")
@click.option("--budget", type=float, default=120.0, show_default=True, metavar="SECONDS", help="Wall time to spend.")
@click.option("--cv", type=int, default=5, show_default=True, metavar="FOLDS", help="Number of folds.")
@click.option("--seed", type=int, default=None, help="Whole number that makes the run repeatable [default: drawn].")
@click.option("--categorical", multiple=True, metavar="NAME", help="Treat a column of numbers as categories.")
@click.option("--ignore", multiple=True, metavar="NAME", help="Leave a column out.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Run directory [default: TABLE-run].")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out.")
@click.option("--quiet", is_flag=True, help="No progress, only the verdict.")
def tune(
    table: Path,
    target: str,
    task: str,
    strategy: str,
    budget: float,
    cv: int,
    seed: int | None,
    categorical: tuple[str, ...],
    ignore: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Find the simplest MLP that predicts a column of TABLE (a CSV file) and write a run directory."""
    from mlpkit.tune import rundir
    from mlpkit.tune.search import tune as search
    from mlpkit.tune.table import read_csv

    directory = rundir.check(out, overwrite) if out is not None else rundir.free_name(table.stem)
    run = search(
        read_csv(table),
        target,
        strategy=strategy,
        budget=budget,
        cv=cv,
        random_state=seed,
        out=directory,
        task=task,
        categorical=categorical,
        ignore=ignore,
        overwrite=overwrite,
        progress=False if quiet else None,
        command=shlex.join(["mlpkit", *sys.argv[1:]]),
    )
    click.echo(_summary(run, directory))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="CSV file to write [default: print].")
def predict(run: Path, table: Path, out: Path | None) -> None:
    """Predict every row of TABLE with the model in the directory RUN; classes come with probabilities."""
    from mlpkit.report import write_whole
    from mlpkit.tune.model import TunedModel
    from mlpkit.tune.table import read_csv

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        reason = "is a directory" if out.is_dir() else "lies in a directory that does not exist"
        raise ArgumentError(f"out: {out} {reason}")
    text = TunedModel.load(run).table(read_csv(table)).to_csv(index=False)
    if out is None:
        click.echo(text, nl=False)
        return
    write_whole(out, text)
    click.echo(f"{out}: {text.count(chr(10)) - 1} rows", err=True)


def _summary(run: Run, directory: Path) -> str:
    lines = ["", *(verdict.text for verdict in run.verdicts), ""]
    cost = f"{run.seconds:.1f} s of a budget of {run.settings['budget']}"
    lines += [f"{len(run.trials)} candidates, {run.settings['cv']} folds, seed {run.settings['seed']}; {cost}"]
    return "\n".join([*lines, f"report: {directory / 'report.html'}", f"model:  {directory / 'model.safetensors'}"])
