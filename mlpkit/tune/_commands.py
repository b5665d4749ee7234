"""``mlpkit tune``, ``predict``, ``report`` and ``compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlpkit.errors import ArgumentError
from mlpkit.tune import rundir

if TYPE_CHECKING:
    from mlpkit.tune.run import Run


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="Column to predict.")
@click.option("--task", type=click.Choice(["auto", "classification", "regression"]), default="auto", show_default=True)
@click.option(
    "--strategy",
    default="auto",
    show_default=True,
    help="auto, constructive (the ladder), grid, random, quasirandom, coarse_to_fine, bayes or sequential.",
)
@click.option("--budget", default="120s", show_default=True, metavar="TEXT", help="90s, 2min, 60cpu-s or 200trials.")
@click.option("--space", type=click.Path(path_type=Path), default=None, help="YAML file of what is searched.")
@click.option("--groups", default=None, metavar="NAME", help="Column whose equal values stay in one fold.")
@click.option("--time", default=None, metavar="NAME", help="Column to order by: tested is what comes later.")
@click.option("--test", type=click.Path(path_type=Path), default=None, help="Table to score once, at the end.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run that was killed.")
@click.option("--storage", default=None, metavar="URL", help="Share the search: postgresql://..., or a journal file.")
@click.option("--study", default=None, metavar="NAME", help="Name of the shared search in --storage.")
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
    budget: str,
    space: Path | None,
    groups: str | None,
    time: str | None,
    test: Path | None,
    resume: bool,
    storage: str | None,
    study: str | None,
    cv: int,
    seed: int | None,
    categorical: tuple[str, ...],
    ignore: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Find the simplest MLP that predicts a column of TABLE (a CSV or Parquet file) and write a run directory."""
    from mlpkit.tune.search import tune as search
    from mlpkit.tune.shared import hidden
    from mlpkit.tune.space import Space
    from mlpkit.tune.table import read_table, take_target

    directory = rundir.check(out, overwrite) if out is not None else rundir.free_name(table.stem)
    run = search(
        read_table(table),
        target,
        strategy=strategy,
        budget=budget,
        space=None if space is None else Space.from_yaml(space),
        groups=groups,
        time=time,
        test=None if test is None else take_target(read_table(test), target),
        resume=resume,
        storage=storage,
        study=study,
        cv=cv,
        random_state=seed,
        out=directory,
        task=task,
        categorical=categorical,
        ignore=ignore,
        overwrite=overwrite,
        progress=False if quiet else None,
        command=hidden(shlex.join(["mlpkit", *sys.argv[1:]])),
    )
    click.echo(_summary(run, directory))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="CSV file to write [default: print].")
@click.option("--id", "identifier", default=None, metavar="NAME", help="Column of TABLE to repeat in front.")
@click.option(
    "--uncertainty", is_flag=True, help="Add how far each prediction can be trusted: intervals, entropy, disagreement."
)
def predict(run: Path, table: Path, out: Path | None, identifier: str | None, uncertainty: bool) -> None:
    """Predict every row of TABLE with the model in the directory RUN; classes come with probabilities."""
    from mlpkit.report import write_whole
    from mlpkit.tune.model import TunedModel
    from mlpkit.tune.table import read_table, take_target

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        reason = "is a directory" if out.is_dir() else "lies in a directory that does not exist"
        raise ArgumentError(f"out: {out} {reason}")
    frame = read_table(table)
    model = TunedModel.load(run)
    predicted = model.table(frame)
    if uncertainty:
        for name, values in model.uncertainty(frame).items():
            predicted.insert(len(predicted.columns), name, values, allow_duplicates=True)
    if identifier is not None:
        predicted.insert(0, identifier, take_target(frame, identifier)[1].to_numpy(), allow_duplicates=True)
    text = predicted.to_csv(index=False)
    if out is None:
        click.echo(text, nl=False)
        return
    write_whole(out, text)
    click.echo(f"{out}: {text.count(chr(10)) - 1} rows", err=True)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Print what the run in the directory RUN found, and where its page is."""
    data = rundir.read(run)
    click.echo("\n".join([*(verdict["text"] for verdict in data["verdicts"]), "", *_leaders(data)]))
    click.echo(f"report: {run / 'report.html'}")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def compare(runs: tuple[Path, ...]) -> None:
    """Winners of several run directories side by side; scores compare only on the same table and folds."""
    found = [(run, rundir.read(run)) for run in runs]
    width = max(len(str(run)) for run, _ in found)
    for run, data in found:
        best = next(trial for trial in data["trials"] if trial["name"] == data["winner"])
        score = f"{data['metric']} {best['mean']:.4f} ± {best['se']:.4f}"
        told = f"{len(data['trials'])} candidates, {data['seconds']:.0f} s"
        click.echo(f"{run!s:<{width}}  {score}  {data['winner']:<16} {told}")
    if len({(data["data"]["sha256"], str(data["fold_of_row"])) for _, data in found}) > 1:
        click.echo("note: these runs differ in their table or folds; a difference of scores may be theirs", err=True)


def _leaders(data: dict[str, Any]) -> list[str]:
    done = sorted((trial for trial in data["trials"] if trial["state"] == "complete"), key=lambda trial: -trial["mean"])
    return [
        f"  {trial['name']:<16} {data['metric']} {trial['mean']:.4f} ± {trial['se']:.4f} {trial['seconds']:7.1f} s"
        for trial in done[:10]
    ]


def _summary(run: Run, directory: Path) -> str:
    told = [verdict.text for verdict in run.verdicts if verdict.kind != "hyperparameter" or verdict.value == "volatile"]
    steady = [item.numbers["part"] for item in run.verdicts if item.kind == "hyperparameter" and item.value == "robust"]
    told += [f"Robust: {', '.join(steady)}."] if steady else []
    lines = ["", *told, ""]
    cost = f"{run.seconds:.1f} s of a budget of {run.settings['budget']}"
    if run.estimate is not None:
        found = run.estimate
        lines += [f"to expect on new rows: {found.score:.3f} (90 %: {found.low:.3f} to {found.high:.3f})"]
    if run.test_score is not None:
        lines += [f"on the test table: {run.test_score:.3f}"]
    lines += [f"{len(run.trials)} candidates, {run.settings['cv']} folds, seed {run.settings['seed']}; {cost}"]
    return "\n".join([*lines, f"report: {directory / 'report.html'}", f"model:  {directory / 'model.safetensors'}"])
