"""A Run as a page: the sections of the tuning report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpkit.report import Code, Fact, Notes, Section, Table, Text, render_page
from mlpkit.tune import plots, search_plots, trust_plots
from mlpkit.tune.findings import Tone
from mlpkit.tune.importance import importance
from mlpkit.tune.ladder import Trial
from mlpkit.tune.plain import versions
from mlpkit.tune.space import Space

if TYPE_CHECKING:
    from mlpkit.tune.run import Run

_SEARCHED = 12  # Candidates of the ladder alone are all in its own figure.
_MOST_ROWS = 300  # The JSON has them all.


def render(run: Run) -> str:
    """The tuning report as one HTML document."""
    verdicts = run.verdicts
    return render_page(
        kind="mlpkit tune",
        title=f"How many layers does {run.estimator.target_name} need?",
        lead=_lead(run),
        verdict=[verdict.text for verdict in verdicts[:3]],
        tone=_tone(run),
        facts=_facts(run),
        sections=[
            Section("Ladder", [plots.ladder(run)], _ladder_intro(run)),
            Section(
                "Leaderboard", [_leaderboard(run)], "Every candidate on the same folds, best first, with its cost."
            ),
            *_searched(run),
            Section(
                "Learning", [plots.curves(run), *_learning_notes(run), plots.top_curves(run)], _learning_intro(run)
            ),
            Section("Folds", [plots.folds(run)], "Each fold is tested by a model that never saw it."),
            Section("Data", _data(run)),
            Section("Reproducibility", _reproducibility(run), "What to repeat to get these numbers again."),
        ],
        data=run.to_dict(curves=False, most=_MOST_ROWS),
        footer=f"mlpkit {versions()['mlpkit']}. This file needs no network.",
    )


def _tone(run: Run) -> Tone:
    tones = [verdict.tone for verdict in run.verdicts]
    worst: Tone = "bad" if "bad" in tones else "notice" if "notice" in tones else "good"
    return worst


def _lead(run: Run) -> str:
    estimator = run.estimator
    what = f"{len(estimator.classes)} classes" if estimator.task == "classification" else "a number"
    return (
        f"{run.data['rows']:,} rows and {len(estimator.columns)} columns predict {what}."
        f" {len(run.trials)} networks were compared on the same {run.settings['cv']} folds,"
        " and a layer had to earn its place by more than one standard error."
    )


def _facts(run: Run) -> list[Fact]:
    winner, linear = run.winner, run.climb.linear
    gain = f"linear: {linear.mean:.3f}" if winner is not linear else "the linear model itself"
    return [
        Fact("Winner", winner.name, winner.words),
        Fact("R²" if run.metric == "R2" else "Accuracy", f"{winner.mean:.3f}", f"± {winner.se:.3f} SE; {gain}"),
        *_honest(run),
        Fact("Parameters", f"{winner.parameters:,}", f"{run.settings['epochs_of_refit']} epochs in the final fit"),
        Fact("Time", f"{run.seconds:.0f} s", f"of a budget of {run.settings['budget']}"),
    ]


def _honest(run: Run) -> list[Fact]:
    found = run.estimate
    facts = []
    if found is not None:
        note = f"90 %: {found.low:.3f} to {found.high:.3f}; {found.optimism:.3f} taken off for the choice"
        facts.append(Fact("To expect", f"{found.score:.3f}", note))
    if run.test_score is not None:
        facts.append(Fact("Test table", f"{run.test_score:.3f}", "scored once, by the final model"))
    return facts


def _searched(run: Run) -> list[Section]:
    """The sections of a search that chose more than layers."""
    space = Space(run.settings["space"])
    found = importance(run.trials, space)
    order = [item.name for item in found]
    order += [name for name in space.free() if name not in order]
    sections = []
    texts = [verdict.text for verdict in run.verdicts[3:] if verdict.kind not in ("budget", "diverged")]
    if texts:
        sections.append(Section("Findings", [Notes(texts)], "What the candidates say, each with what decided."))
    wide = len(run.trials) >= _SEARCHED
    lines = search_plots.parallel(run, space, order) if wide else None
    if lines is not None:
        sections.append(Section("Search", [lines], "Every candidate as a line over what was chosen for it."))
    slices = search_plots.slices(run, space, order) if wide else []
    if slices:
        sections.append(Section("Slices", slices, "Each part by itself, with its verdict and the alarm of its border."))
    contours = search_plots.contours(run, space)
    if contours:
        sections.append(Section("Contours", contours, "Two parts at a time."))
    bars = search_plots.importances(found)
    if bars is not None:
        sections.append(Section("Importance", [bars], "What the score depended on."))
    return [*sections, *_trusted(run)]


def _trusted(run: Run) -> list[Section]:
    """What the rows that no network learnt from say about probabilities and intervals."""
    rows = run.truth()
    if rows is None:
        return []
    if run.estimator.task == "classification":
        figure = trust_plots.calibration(*rows, run.estimator.temperature)
        sure = trust_plots.selective(*rows, run.estimator.temperature)
        return [
            Section("Calibration", [figure], "Can the probabilities be trusted?"),
            Section("Uncertainty", [sure], "Are the predictions it is sure of better?"),
        ]
    interval = run.estimator.interval
    if interval is None:
        return []
    figure = trust_plots.coverage(*rows)
    errors = trust_plots.errors(*rows, interval)
    return [
        Section("Calibration", [figure], "Do intervals hold what they promise?"),
        Section("Uncertainty", [errors], "How far off is a prediction?"),
    ]


def _ladder_intro(run: Run) -> str:
    text = (
        "Points are means over the folds, bars one standard error."
        " A deeper rung replaces a simpler one only if it gains more than that, fold by fold."
    )
    return " ".join([text, *(verdict.text for verdict in run.verdicts[3:] if verdict.kind in ("budget", "diverged"))])


def _leaderboard(run: Run) -> Table:
    linear = run.climb.linear
    done = sorted((trial for trial in run.trials if trial.state == "complete"), key=lambda trial: -trial.mean)
    rest = [trial for trial in run.trials if trial.state != "complete"]
    rows = [_row(trial, linear) for trial in [*done, *rest]]
    rows += [
        ["-".join(map(str, hidden)), None, None, None, None, None, None, "not tried", None]
        for hidden in run.climb.untried
    ]
    rows = rows[:_MOST_ROWS]
    metric = "R²" if run.metric == "R2" else "Accuracy"
    columns = [
        "Hidden layers",
        metric,
        "SE",
        "Against linear",
        "On training rows",
        "Parameters",
        "Seconds",
        "State",
        "Why it stopped",
    ]
    place = done.index(run.winner)
    return Table(columns, rows, highlight=[place] if place < _MOST_ROWS else [])


def _row(trial: Trial, linear: Trial) -> list[object]:
    if trial.state != "complete":
        return [
            trial.name, None, None, None, None, trial.parameters, f"{trial.seconds:.1f}", trial.state, trial.reason
        ]  # fmt: skip
    change = "baseline" if trial is linear else f"{trial.mean - linear.mean:+.4f}"
    return [
        trial.name, f"{trial.mean:.4f}", f"{trial.se:.4f}", change, f"{trial.train_mean:.4f}", trial.parameters,
        f"{trial.seconds:.1f}", trial.state, trial.reason,
    ]  # fmt: skip


def _learning_intro(run: Run) -> str:
    what = "log loss" if run.estimator.task == "classification" else "squared error of the standardised target"
    return f"Training and validation loss of the winner ({what}), one thin line per fold, the mean of both in bold."


def _learning_notes(run: Run) -> list[Text]:
    epochs = sorted(outcome.best_epoch + 1 for outcome in run.winner.outcomes)
    stops = sorted({outcome.stopped for outcome in run.winner.outcomes})
    reason = {
        "patience": "patience ran out", "epochs": "the limit of epochs was reached", "clock": "the clock ended it",
    }  # fmt: skip
    words = " or ".join(reason.get(stop, stop) for stop in stops)
    text = (
        f"Best epochs by fold: {', '.join(map(str, epochs))}. Training stopped when {words}; the best epoch was kept."
    )
    return [Text(text)]


def _data(run: Run) -> list[Notes | Table | Text]:
    kinds = {"numeric": "number", "categorical": "category"}
    codes = {code["name"]: code for code in run.estimator.encoder.to_dict()}
    rows: list[list[object]] = []
    for column in run.estimator.columns:
        code = codes[column.name]
        if column.kind == "numeric":
            gaps = "median of the training rows, and an indicator" if code["indicator"] else "none seen"
            rows.append([column.name, kinds[column.kind], f"mean {code['mean']:.4g}, SD {code['scale']:.4g}", gaps])
        else:
            gaps = "a category of their own" if None in code["levels"] else "none seen"
            rows.append([column.name, kinds[column.kind], f"{len(code['levels'])} inputs, one per category", gaps])
    blocks: list[Notes | Table | Text] = [Notes(run.data["notes"])] if run.data["notes"] else []
    blocks.append(
        Text("In each fold the encoding below was learnt from the training rows alone; shown is the final fit's.")
    )
    blocks.append(
        Table(["Column", "Kind", "Encoding", "Gaps"], rows, f"{len(rows)} input columns", collapsed=len(rows) > 12)
    )
    return blocks


def _reproducibility(run: Run) -> list[Code | Table]:
    command, found = run.command, versions()
    settings = run.settings
    kind = "stratified by class" if run.estimator.task == "classification" else "random"
    rows: list[list[object]] = [
        ["Seed", f"{settings['seed']}"],
        [
            "Folds",
            f"{settings['cv']}, {kind}, test parts of {', '.join(str(len(fold.test)) for fold in run.folds)} rows",
        ],
        ["Validation", f"{len(run.folds[0].validation)} rows of each training part decide when to stop"],
        ["Strategy", str(settings["strategy"])],
        ["Data (SHA-256)", f"{run.data['sha256'][:16]} ... (whole in the JSON)"],
    ]
    rows += [[name, value] for name, value in found.items()]
    blocks: list[Code | Table] = [Code(command, "Command")] if command else []
    return [*blocks, Table(["Setting", "Value"], rows)]
