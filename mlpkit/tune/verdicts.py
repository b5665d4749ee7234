"""The numbers of a climb in plain sentences, each with the number that decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlpkit.tune import findings, stats
from mlpkit.tune.columns import single_columns
from mlpkit.tune.ensemble import Committee
from mlpkit.tune.evaluate import Search
from mlpkit.tune.findings import Verdict
from mlpkit.tune.fit_verdict import fit, ratio
from mlpkit.tune.honest import Estimate
from mlpkit.tune.ladder import TAPERS, WIDTHS, Climb, Trial, in_words

_SEARCHED = 12  # The ladder alone says of a part what its own verdicts say.


def judge(
    climb: Climb, metric: str, floor: float, search: Search | None = None, committee: Committee | None = None,
    expected: Estimate | None = None,
) -> list[Verdict]:  # fmt: skip
    """All verdicts, the three main ones first. floor: the score of a constant guess (largest class, or mean)."""
    verdicts = [_depth(climb, metric), fit(climb, metric, floor, expected), _neighbours(climb, metric)]
    if search is not None and search.converged:
        verdicts.append(_converged(search))
    elif _cut_short(climb):
        verdicts.append(_budget(climb))
    diverged = [trial.words for trial in climb.trials if trial.state == "diverged"]
    if diverged:
        verdicts.append(
            Verdict("diverged", "diverged", f"The loss became non-finite with {_listed(diverged)}: left out.", "notice")
        )
    more = [findings.ensemble(committee, metric), findings.shape(climb), findings.regularisation(climb)]
    if search is not None:
        more.append(findings.leakage(single_columns(search.problem, search.folds), metric))
        more += findings.borders(climb.trials, search.space)
        if len(climb.trials) >= _SEARCHED:
            more += findings.hyperparameters(climb.trials, search.space, climb.winner)
    return verdicts + [verdict for verdict in more if verdict is not None]


def _depth(climb: Climb, metric: str) -> Verdict:
    winner, linear = climb.winner, climb.linear
    if not climb.steps:
        text = f"Only the linear model was tried ({metric} {linear.mean:.3f}): nothing deeper finished in time."
        return Verdict("depth", "inconclusive", text, "notice", {"score": linear.mean, "se": linear.se})
    if climb.winner_rung == 0:
        rung = max(climb.steps, key=lambda number: climb.steps[number].gain)
        step, rival = climb.steps[rung], climb.best[rung]
        text = (
            f"{_first(climb, 'linear')} is enough: {metric} {linear.mean:.3f} without a hidden layer; {rival.words}"
            f" {_change(step)}, and more than one SE is asked of a layer."
        )
        return Verdict("depth", "linear", text, "good", _numbers(step, winner, rival))
    step = stats.compare(winner.scores, linear.scores)
    text = (
        f"{_first(climb, winner.words)} won: {metric} {winner.mean:.3f} against {linear.mean:.3f} for linear,"
        f" a gain of {_signed(step.gain)} or {ratio(step)} SE."
    )
    if climb.winner_rung == 1 and 2 in climb.steps:
        text += f" A second layer {_change(climb.steps[2])} and did not earn its place."
    elif climb.winner_rung >= 2 and 1 in climb.best:
        below = stats.compare(winner.scores, climb.best[1].scores)
        text += f" Against the best single layer ({climb.best[1].name}) it gains {ratio(below)} SE."
    return Verdict("depth", f"{climb.winner_rung} hidden", text, "good", _numbers(step, winner, linear))


def _cut_short(climb: Climb) -> bool:
    return bool(climb.untried) or any(trial.state == "out of time" for trial in climb.trials)


def _first(climb: Climb, words: str) -> str:
    return f"Of what the budget allowed, {words}" if _cut_short(climb) else words.capitalize()


def _neighbours(climb: Climb, metric: str) -> Verdict:
    winner = climb.winner
    best: dict[tuple[int, ...], Trial] = {}
    for trial in climb.trials:
        if trial.state == "complete" and (trial.hidden not in best or trial.mean > best[trial.hidden].mean):
            best[trial.hidden] = trial
    near = [best[hidden] for hidden in _near(winner.hidden) if hidden in best]
    if not near:
        return Verdict("neighbours", "inconclusive", "No neighbour of the winner finished in time.", "notice")
    changes = {trial.name: stats.compare(trial.scores, winner.scores) for trial in near}
    numbers = {name: {"change": step.gain, "se": step.se} for name, step in changes.items()}
    better = [name for name, step in changes.items() if step.earned]
    if better:
        text = f"The neighbours disagree: {_listed(better)} beat it by more than one SE."
        return Verdict("neighbours", "volatile", text, "notice", numbers)
    if winner is climb.linear:
        name = max(changes, key=lambda item: changes[item].gain)
        text = (
            f"The neighbours agree: none of {len(near)} networks with one hidden layer beats it by more than one SE"
            f" (best: {name}, {_signed(changes[name].gain)})."
        )
        return Verdict("neighbours", "robust", text, "good", numbers)
    listed = _listed([f"{name} {_signed(step.gain)}" for name, step in changes.items()])
    worse = [name for name, step in changes.items() if step.ratio < -1.0]
    if worse:
        verb = "is" if len(worse) == 1 else "are"
        text = f"Its size matters: {_listed(worse)} {verb} worse by more than one SE ({metric}: {listed})."
        return Verdict("neighbours", "sensitive", text, "good", numbers)
    text = f"The neighbours agree within one SE ({listed}): the exact size hardly matters."
    return Verdict("neighbours", "robust", text, "good", numbers)


def _near(hidden: tuple[int, ...]) -> list[tuple[int, ...]]:
    if not hidden:
        return [(width,) for width in WIDTHS]
    first = hidden[0]
    if len(hidden) == 1:
        return [(first // 2,), (first * 2,)]
    return [(first, first // taper) for taper in TAPERS if first // taper != hidden[1]]


def _find(climb: Climb, hidden: tuple[int, ...]) -> Trial | None:
    for trial in climb.trials:
        if trial.hidden == hidden and trial.state == "complete" and trial is not climb.winner:
            return trial
    return None


def _budget(climb: Climb) -> Verdict:
    left = [trial.words for trial in climb.trials if trial.state == "out of time"] + [
        in_words(hidden) for hidden in climb.untried
    ]
    counts = {words: left.count(words) for words in left}
    told = [words if count == 1 else f"{words} ({count} settings)" for words, count in counts.items()]
    text = f"The time budget ended before {_listed(told)}: not compared."
    return Verdict("budget", "cut short", text, "notice", {"left_out": left})


def _converged(search: Search) -> Verdict:
    spent, budget = search.clock.now(), search.clock.budget
    used = f"{len(search.trials)} trials" if budget.unit == "trials" else f"{spent:.0f} s"
    text = (
        f"The search converged: its last {search.converged} candidates gained less than a quarter of one SE; it ended"
        f" after {used} of a budget of {budget}."
    )
    return Verdict("budget", "converged", text, "good", {"idle": search.converged, "seconds": spent})


def _numbers(step: stats.Comparison, winner: Trial, rival: Trial) -> dict[str, Any]:
    return {
        "score": winner.mean, "score_se": winner.se, "rival": rival.name, "rival_score": rival.mean,
        "gain": step.gain, "se": step.se, "gain_in_se": step.ratio,
    }  # fmt: skip


def _change(step: stats.Comparison) -> str:
    verb = "gains" if step.gain > 0 else "loses" if step.gain < 0 else "changes"
    return f"{verb} {abs(step.gain):.3f} ({ratio(step)} SE)"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
