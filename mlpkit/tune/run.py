"""The result of ``tune``: the model, what was tried, what was found, and how to write it down."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mlpkit.report import write_whole
from mlpkit.tune import rundir
from mlpkit.tune.ensemble import Committee
from mlpkit.tune.evaluate import Search
from mlpkit.tune.final import unseen
from mlpkit.tune.findings import Verdict
from mlpkit.tune.folds import Fold
from mlpkit.tune.honest import Estimate
from mlpkit.tune.ladder import Climb, Trial
from mlpkit.tune.model import TunedModel
from mlpkit.tune.plain import committee_of, plain, trial_of, versions

_FORMAT = "mlpkit-tune"
_VERSION = 1


@dataclass
class Run:
    """What ``tune`` returns.

    ``estimator`` predicts on raw tables, ``model`` is its network (an nn.Module on encoded inputs); ``verdicts`` are
    the findings in words, ``trials`` the candidates, ``study`` the same as an Optuna study. ``estimate`` is the score
    one may expect, corrected for the choice; ``test_score`` that on the test table, if one was given.
    ``committee``: the average of finalists, whether or not it took the winner's place; None where none was judged.
    """

    estimator: TunedModel
    verdicts: list[Verdict]
    climb: Climb
    study: Any
    folds: Sequence[Fold]
    metric: str
    settings: dict[str, Any]
    data: dict[str, Any]
    command: str | None
    seconds: float
    estimate: Estimate | None = None
    search: Search | None = None
    test_score: float | None = None
    committee: Committee | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the study, the search and outputs of rows: what holds locks or the table."""
        return {**self.__dict__, "study": None, "search": None, "committee": None}

    @property
    def model(self) -> nn.Module:
        """The network that predicts, fitted on all rows: the winner's, or an average of finalists."""
        return self.estimator.model

    @property
    def trials(self) -> list[Trial]:
        """Every candidate that was started, in order."""
        return self.climb.trials

    @property
    def winner(self) -> Trial:
        """The candidate the ladder chose."""
        return self.climb.winner

    def truth(self) -> tuple[Any, Any] | None:
        """(outputs, truth) on all test rows: logits and class numbers, or both as networks see numbers.

        The outputs are those of networks that did not learn from the row; None where they were not kept.
        """
        if self.search is None:
            return None
        return unseen(self.search, self.winner, self.committee)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one HTML file that works offline."""
        from mlpkit.tune.page import render

        return write_whole(path, render(self))

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write report.html, report.json, trials.csv, model.safetensors and model.json: all or, on an error, nothing.

        directory: absent or empty; with overwrite an earlier run is replaced.
        """

        def fill(folder: Path) -> None:
            self.estimator.save(folder)
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            (folder / "report.json").write_text(text + "\n", encoding="utf-8")
            (folder / "trials.csv").write_text(self.to_csv(), encoding="utf-8")
            self.report(folder / "report.html")

        path = Path(directory)
        rundir.write(path, overwrite, fill)
        return path

    def to_csv(self) -> str:
        """One line a candidate: name, stage, scores, cost, why it stopped, and what was chosen for it."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.params))
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            ["number", "name", "stage", "state", "mean", "se", "train", "parameters", "seconds", "reason", *names]
        )
        for trial in self.trials:
            train = trial.train_mean if trial.outcomes else math.nan
            writer.writerow(
                [
                    trial.number, trial.name, trial.stage, trial.state, trial.mean, trial.se, train, trial.parameters,
                    round(trial.seconds, 4), trial.reason, *(trial.params.get(name, "") for name in names),
                ]
            )  # fmt: skip
        return stream.getvalue()

    def to_dict(self, *, curves: bool = True, most: int | None = None) -> dict[str, Any]:
        """All numbers of the run as plain data: the contents of report.json. Not-a-number becomes None.

        curves: losses by epoch and the fold of each row too. most: this many trials, the best; None is all of them.
        """
        trials = self.trials
        if most is not None and len(trials) > most:
            best = sorted(trials, key=lambda trial: (trial.state != "complete", -trial.mean))[:most]
            kept = {id(trial) for trial in [*best, self.winner]}
            trials = [trial for trial in trials if id(trial) in kept]
        estimator = self.estimator
        whole: dict[str, Any] = plain(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "task": estimator.task,
                "target": estimator.target_name,
                "metric": self.metric,
                "winner": self.winner.name,
                "estimate": None if self.estimate is None else asdict(self.estimate),
                "test_score": self.test_score,
                "committee": committee_of(self.committee),
                "verdicts": [asdict(verdict) for verdict in self.verdicts],
                "trials": [trial_of(trial, curves) for trial in trials],
                "steps": {str(rung): asdict(step) for rung, step in self.climb.steps.items()},
                "untried": [list(hidden) for hidden in self.climb.untried],
                "settings": self.settings,
                "data": {
                    **self.data,
                    "columns": [asdict(column) for column in estimator.columns],
                    "classes": list(estimator.classes),
                },
                "fold_of_row": self.fold_of_row() if curves else None,
                "environment": {"versions": versions(), "command": self.command},
                "seconds": self.seconds,
            }
        )
        return whole

    def fold_of_row(self) -> list[int]:
        """For every row (with a target) the fold that tests it; -1 for none. Of a large table, those searched."""
        part = [-1] * int(self.data.get("searched", self.data["rows"]))
        for number, fold in enumerate(self.folds):
            for row in fold.test:
                part[int(row)] = number
        return part
