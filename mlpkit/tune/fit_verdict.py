"""Does it underfit, overfit, or lack rows? The verdict on the winner's fit, with the numbers that decided."""

from __future__ import annotations

import numpy as np

from mlpkit.tune import stats
from mlpkit.tune.findings import Verdict
from mlpkit.tune.honest import Estimate
from mlpkit.tune.ladder import Climb, Trial, rise_after_best
from mlpkit.tune.trainer import Outcome

_OVERFIT_TIMES_LINEAR = 3.0
_RISE_SE = 2.0
_NOTHING = 0.02
_MORE_ROWS = 0.01  # Twice the rows must have gained this much of the score for more to be worth asking for.
_STILL_FALLING = 0.02
_GIVEN_BACK, _GIVEN_BACK_WIDE = 0.2, 0.05
_EDGE_SE = 2.0
_NORMAL_95, _NORMAL_90 = 1.96, 1.645


def fit(climb: Climb, metric: str, floor: float, expected: Estimate | None = None) -> Verdict:
    """One of "no signal", "underfit", "overfit", "data-limited" or "fine", the first of these that holds.

    floor: the score of a constant guess. expected: the score without the luck of the choice. No signal: that score is
    within 0.02 of the floor, or the floor within its 95 % interval. Underfit: the widest layer tried won by more than
    two SE while training rows are hardly better than unseen ones, a bigger network of the same depth gains one, or the
    validation loss still fell at the last epoch. Overfit: it ended more than 2 SE above its minimum, and either gave
    back a fifth of its fall, or a twentieth where the gap of training to test score is over three times that of linear.
    Data-limited: half of the training rows lose more than one SE, and at least 0.01.
    """
    winner, linear = climb.winner, climb.linear
    gap, linear_gap = winner.train_mean - winner.mean, linear.train_mean - linear.mean
    rise = rise_after_best(winner)
    numbers = {
        "train": winner.train_mean, "test": winner.mean, "gap": gap, "linear_gap": linear_gap, "rise_se": rise,
        "floor": floor,
    }  # fmt: skip
    scores = f"{metric} {winner.train_mean:.3f} on training rows, {winner.mean:.3f} on unseen ones"
    if _nothing(winner, floor, expected):
        text = f"It learnt next to nothing: {metric} {winner.mean:.3f}, a constant guess reaches {floor:.3f}."
        return Verdict("fit", "no signal", text, "bad", numbers)
    small = _underfit(climb, gap, linear_gap)
    if small is not None:
        return Verdict("fit", "underfit", f"{small[0]} ({scores}).", "notice", {**numbers, **small[1]})
    back = given_back(winner)
    wide = gap > max(_OVERFIT_TIMES_LINEAR * max(linear_gap, 0.0), winner.se)
    if rise > _RISE_SE and (back > _GIVEN_BACK or (wide and back > _GIVEN_BACK_WIDE)):
        text = (
            f"It overfits if left alone: after its best epoch the validation loss rose by {rise:.1f} SE and gave back"
            f" {min(back, 9.99):.0%} of its fall ({scores}). Early stopping took the best epoch."
        )
        return Verdict("fit", "overfit", text, "notice", {**numbers, "given_back": back})
    rows = _rows(winner)
    if rows is not None and rows.earned and rows.gain > _MORE_ROWS:
        text = (
            f"More rows would help: half of them reach {metric} {stats.mean(_scores(winner.halved)):.3f},"
            f" all {winner.mean:.3f}, {ratio(rows)} SE more ({scores})."
        )
        return Verdict(
            "fit", "data-limited", text, "notice", {**numbers, "gain_of_rows": rows.gain, "rows_se": rows.se}
        )
    text = f"Neither under- nor overfit: {scores}, a gap of {gap:.3f}"
    if winner is not linear:
        text += f" (linear: {linear_gap:.3f})"
    return Verdict("fit", "fine", text + ".", "good", numbers)


def curve(trial: Trial) -> str:
    """What a candidate's learning curves say, in words."""
    rise = rise_after_best(trial)
    if falling(trial) > _STILL_FALLING:
        return "still falling at its last epoch: underfits"
    if rise > _RISE_SE and given_back(trial) > _GIVEN_BACK:
        return f"rises by {rise:.1f} SE after its best epoch: overfits"
    return "levels off: fine"


def given_back(trial: Trial) -> float:
    """How far the validation loss rose after its best epoch, as a share of how far it had fallen until then."""
    curves = [outcome.validation_loss for outcome in trial.outcomes if outcome.validation_loss]
    fall = sum(loss[0] - min(loss) for loss in curves)
    rise = sum(loss[-1] - min(loss) for loss in curves)
    return rise / max(fall, 1e-3) if curves else 0.0


def ratio(step: stats.Comparison) -> str:
    """Standard errors in words."""
    return f"{abs(step.ratio):.1f}" if np.isfinite(step.ratio) else "many"


def _nothing(winner: Trial, floor: float, expected: Estimate | None) -> bool:
    if expected is None:
        return winner.mean <= floor + max(winner.se, _NOTHING)
    se = (expected.high - expected.score) / _NORMAL_90
    return expected.score <= floor + max(_NORMAL_95 * se, _NOTHING)


def _underfit(climb: Climb, gap: float, linear_gap: float) -> tuple[str, dict[str, float]] | None:
    """(why more capacity or time would help, the numbers), or None."""
    winner = climb.winner
    edge = _edge(climb)
    # Where training rows are told far better than unseen ones, it is not for lack of units.
    if edge is not None and edge.ratio > _EDGE_SE and gap < max((1.0 - winner.train_mean) / 2.0, winner.se):
        text = f"It may underfit: the widest layer tried won, {ratio(edge)} SE ahead of the next"
        return text, {"edge_ratio": edge.ratio}
    better = _bigger_is_better(climb)
    if better is not None and gap < max(linear_gap, winner.se):
        text = (
            f"It may underfit: {better[0].name} gains {ratio(better[1])} SE and training rows are no better than"
            " unseen ones"
        )
        return text, {"bigger_ratio": better[1].ratio}
    late = falling(winner)
    if late > _STILL_FALLING:
        epochs = max(len(outcome.validation_loss) for outcome in winner.outcomes)
        text = f"It may underfit: at the last of {epochs} epochs the validation loss still fell"
        return text, {"still_falling": late}
    return None


def _edge(climb: Climb) -> stats.Comparison | None:
    """The widest single layer against the next narrower one, if the widest is the base of the winner."""
    if climb.winner_rung == 0 or 1 not in climb.best:
        return None
    best: dict[int, Trial] = {}
    for trial in climb.trials:
        if trial.state == "complete" and len(trial.hidden) == 1:
            width = trial.hidden[0]
            if width not in best or trial.mean > best[width].mean:
                best[width] = trial
    widths = sorted(best)
    if len(widths) < 2 or climb.best[1].hidden != (widths[-1],):
        return None
    return stats.compare(climb.best[1].scores, best[widths[-2]].scores)


def _bigger_is_better(climb: Climb) -> tuple[Trial, stats.Comparison] | None:
    """A larger network that beats the winner by more than one SE, and yet was not chosen."""
    for trial in climb.trials:
        if trial.state == "complete" and trial.parameters > climb.winner.parameters and not trial.params.get("dropout"):
            step = stats.compare(trial.scores, climb.winner.scores)
            if step.earned and len(trial.hidden) == len(climb.winner.hidden):
                return trial, step
    return None


def falling(trial: Trial) -> float:
    """The share of the whole fall of the validation loss that its last fifth brought, if all folds ran to the end."""
    shares = []
    for outcome in trial.outcomes:
        loss = outcome.validation_loss
        if outcome.stopped != "epochs" or len(loss) < 2:
            return 0.0
        whole = loss[0] - min(loss) if outcome.best_epoch >= 0.95 * len(loss) - 1 else 0.0
        shares.append((loss[int(0.8 * (len(loss) - 1))] - loss[-1]) / whole if whole > 0.0 else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def _rows(winner: Trial) -> stats.Comparison | None:
    return stats.compare(_scores(winner.outcomes), _scores(winner.halved)) if winner.halved else None


def _scores(outcomes: list[Outcome]) -> list[float]:
    return [outcome.score for outcome in outcomes]
