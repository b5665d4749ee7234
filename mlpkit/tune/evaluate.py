"""Runs candidates against the budget: batches in, trials out. The one place of the search that calls the trainer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from mlpkit.errors import NonFiniteError
from mlpkit.tune import progress as speak
from mlpkit.tune import trainer
from mlpkit.tune.budget import Clock
from mlpkit.tune.folds import Fold
from mlpkit.tune.journal import Journal, Work
from mlpkit.tune.ladder import State, Trial
from mlpkit.tune.problem import Problem, encode_fold
from mlpkit.tune.rows import row_scores
from mlpkit.tune.space import Encoding, Params, Space
from mlpkit.tune.spec import Spec

_LR = 6e-3
_WEIGHT_DECAY = 0.3  # AdamW's: the weights shrink by lr * weight_decay = 0.18 % a step.
_WRAP_UP_SECONDS = 0.5
_MEASURED_SECONDS = 0.1
_MOST_OF_THE_REST, _ALL_OF_IT = 0.5, 1.2
_RUNG_FOLDS = 2  # Candidates are compared after this many folds; the others are for those that keep up.
_PRUNE_SE = 3.0
_SEEDS_APART = 5000  # Folds and repeats take the seeds between.
_LEAST_ROWS = 30  # Fewer rows on the rung say too little to stop anybody.


class Search:
    """A problem, its folds and a budget: ``evaluate`` trains candidates, ``trials`` holds all that were started."""

    def __init__(
        self, problem: Problem, folds: Sequence[Fold], space: Space, seed: int, clock: Clock, say: speak.Silent,
        journal: Journal | None = None,
    ) -> None:  # fmt: skip
        self.problem, self.folds, self.space, self.seed = problem, folds, space, seed
        self.clock, self.say, self.journal = clock, say, journal or Journal()
        self.trials: list[Trial] = []
        self.untried: list[Params] = []
        self.out_features = len(problem.target.classes)
        self.metric = "accuracy" if self.out_features else "R2"
        self._encoded: dict[Encoding, list[trainer.FoldData]] = {}
        self._known: dict[str, Trial] = {}
        self.rows = len(folds[0].train)
        self.base = make_spec((), self.rows, seed)
        self._held = (0.0, 0.0)
        self.converged = 0
        self._spent = [0.0, 0.0]
        self.final_fits = 1
        self.threads = 1
        self.averaging = False
        self.share = 1.0

    @property
    def done(self) -> bool:
        """True when nothing more may start."""
        return self.clock.trials_left < 1 or self.clock.now() + self._typical() > self._deadline()

    @property
    def linear(self) -> Trial:
        """The candidate without a hidden layer; it is trained first and always finishes."""
        for trial in self.trials:
            if not trial.hidden and trial.stage == "linear":
                return trial
        return self._linear()

    @property
    def best(self) -> Trial:
        """The best mean so far."""
        done = [trial for trial in self.trials if trial.state == "complete"]
        return max(done or [self.linear], key=lambda trial: (trial.mean, -trial.parameters))

    def complete(self, params: Mapping[str, Any]) -> Params:
        """``params`` and what the user fixed, without what does not matter."""
        fixed = {name: self.space.parts[name].from_unit(0.5) for name in self.space.given if name not in params}
        fixed = {name: value for name, value in fixed.items() if self.space.parts[name].fixed}
        return self.space.reduce({**fixed, **params})

    def spec(self, params: Mapping[str, Any]) -> tuple[Spec, Encoding]:
        """The member and encoding of a candidate."""
        return self.space.spec(params, self.base)

    def evaluate(self, batch: Sequence[Mapping[str, Any]], stage: str, *, prune: bool = True) -> list[Trial | None]:
        """Train a batch on all folds, or until a rung stops a candidate. None: the budget did not allow it.

        A candidate that was trained before is not trained again.
        """
        wanted = [self.complete(params) for params in batch]
        if not self.trials:
            _ = self.linear
        fresh: dict[str, Trial] = {}
        rest = self._deadline() - self.clock.now()
        for params in wanted:
            key = self._key(params)
            if key in self._known or key in fresh:
                continue
            if self.clock.trials_left < len(fresh) + 1 or self.done:
                self.untried.append(params)
                continue
            trial = self._trial(params, stage)
            cost = self._cost(trial)
            # What could not be finished is not begun.
            if cost > min(_MOST_OF_THE_REST * rest, _ALL_OF_IT * rest - sum(map(self._cost, fresh.values()))):
                self.untried.append(params)
                continue
            fresh[key] = trial
        self._train(list(fresh.values()), prune)
        for key, trial in fresh.items():
            if trial.outcomes:
                self._add(key, trial)
            else:
                self.untried.append(trial.params)
        return [self._known.get(self._key(params)) for params in wanted]

    def repeat(self, trials: Sequence[Trial], folds: Sequence[Fold], round_: int) -> None:
        """Train finished trials again on other folds with other seeds; their scores are appended."""
        data: dict[Encoding, list[trainer.FoldData]] = {}
        for trial in trials:
            spec, encoding = self.spec(trial.params)
            if encoding not in data:
                data[encoding] = [encode_fold(self.problem, fold, encoding) for fold in folds]
            if self.clock.now() + self._typical() > self._deadline():
                return
            again = replace(spec, seed=spec.seed + 1000 * round_)
            outcomes = self._call([again], encoding, data[encoding], 0, f"repeat {round_}")[0]
            if _state(outcomes, len(folds)) != "complete":
                return
            trial.repeats += outcomes

    def halve(self, trial: Trial) -> None:
        """Train a finished trial on every second training row of its folds: would more rows help?"""
        spec, encoding = self.spec(trial.params)
        if trial.halved or self.clock.now() + self._typical() > self._deadline():
            return
        data = [replace(fold, train=_every_second(fold.train)) for fold in self._data(encoding)]
        outcomes = self._call([spec], encoding, data, 0, "half")[0]
        if _state(outcomes, len(self.folds)) == "complete":
            trial.halved = outcomes

    def retrain(self, trial: Trial, times: int) -> None:
        """Train a finished trial on its folds from other seeds, at once: its networks can be averaged."""
        spec, encoding = self.spec(trial.params)
        if trial.again or self.clock.now() + times * self._typical() > self._deadline():
            return
        specs = [again(spec, number) for number in range(1, times + 1)]
        found = self._call(specs, encoding, self._data(encoding), 0, "again")
        if all(_state(outcomes, len(self.folds)) == "complete" for outcomes in found):
            trial.again = found

    def _linear(self) -> Trial:
        trial = self._trial(self.complete({"layers": 0}), "linear")
        spec, encoding = self.spec(trial.params)
        self.say.start(trial.hidden)
        # The baseline may use half of what there is and keeps its best weights at that point.
        now = self.clock.now()
        deadline = now + max(self._deadline() - now, 0.0) / 2
        trial.outcomes = self._call([spec], encoding, self._data(encoding), 0, "", deadline=deadline, keep=True)[0]
        self._finish(trial)
        if trial.state != "complete":
            raise NonFiniteError("tune: the loss of the linear model became non-finite; look for extreme values")
        self._add(self._key(trial.params), trial)
        return trial

    def _train(self, trials: Sequence[Trial], prune: bool) -> None:
        rung = min(_RUNG_FOLDS, len(self.folds)) if prune and len(self.folds) > _RUNG_FOLDS else len(self.folds)
        self._train_folds(trials, 0, rung)
        alive = [trial for trial in trials if len(trial.outcomes) == rung and trial.outcomes[-1].finished]
        if rung < len(self.folds):
            reasons = self._behind(alive, rung)
            for trial in alive:
                trial.reason = reasons.get(id(trial), "")
            self._train_folds([trial for trial in alive if not trial.reason], rung, len(self.folds))
        for trial in trials:
            self._finish(trial)

    def _train_folds(self, trials: Sequence[Trial], first: int, stop: int) -> None:
        groups: dict[Encoding, list[Trial]] = {}
        for trial in trials:
            groups.setdefault(self.spec(trial.params)[1], []).append(trial)
        for encoding, members in groups.items():
            specs = [self.spec(trial.params)[0] for trial in members]
            self.say.start(members[0].hidden)
            results = self._call(specs, encoding, self._data(encoding)[first:stop], first, "")
            for trial, outcomes in zip(members, results):
                trial.outcomes += [outcome for outcome in outcomes if outcome.stopped != "not started"]

    def _call(
        self, specs: Sequence[Spec], encoding: Encoding, data: Sequence[trainer.FoldData], first: int, mark: str,
        deadline: float | None = None, keep: bool = False,
    ) -> list[list[trainer.Outcome]]:  # fmt: skip
        """The door to training, with the journal before it: who else is at work there trains a part of it."""
        limit = self._deadline() if deadline is None else deadline
        work = [(spec, encoding, mark, first) for spec in specs]
        results: dict[int, list[trainer.Outcome]] = {}
        while True:
            results |= {
                at: known for at in range(len(specs)) if at not in results and (known := self._recall(work[at]))
            }
            missing = [at for at in range(len(specs)) if at not in results]
            if not missing or (not keep and self.clock.now() > limit and results):
                break
            taken = [missing[at] for at in self.journal.take([work[at] for at in missing])]
            if not taken:
                self.journal.wait()
                continue
            before = self.clock.now()
            trained = trainer.train_members(
                [specs[at] for at in taken], data, self.out_features, deadline=limit, keep_at_deadline=keep,
                on_fold=lambda _spec, _fold, outcome: self.say.fold(outcome), first_fold=first, clock=self.clock.now,
                threads=self.threads,
            )  # fmt: skip
            self._spent[0] += self.clock.now() - before
            self._spent[1] += sum(outcome.seconds for outcomes in trained for outcome in outcomes)
            for at, outcomes in zip(taken, trained):
                if encoding.log_target:
                    self._rescore(outcomes, encoding, first)
                results[at] = outcomes
                self.journal.add(work[at], outcomes)
        return [results.get(at, []) for at in range(len(specs))]

    def _recall(self, work: Work) -> list[trainer.Outcome] | None:
        known = self.journal.find(work)
        if known is not None and self.journal.credits:
            self.clock.credit += sum(outcome.seconds for outcome in known) / self._at_once
        return known

    def _rescore(self, outcomes: Sequence[trainer.Outcome], encoding: Encoding, first: int) -> None:
        """The trainer's R2 is that of the logarithm; candidates are compared in the target's own units."""
        for fold, outcome in zip(self.folds[first:], outcomes):
            rows = row_scores(self.problem, [fold], encoding, [outcome]) if outcome.finished else None
            if rows is not None:
                weight = self.problem.weight
                outcome.score = float(np.average(rows, weights=None if weight is None else weight[fold.test]))

    def _behind(self, trials: Sequence[Trial], rung: int) -> dict[int, str]:
        """Who stops at the rung, and why: row by row on the same folds, too far behind the best seen."""
        tests = [fold.test for fold in self.folds[:rung]]
        if sum(map(len, tests)) < _LEAST_ROWS:
            return {}
        rivals = [trial for trial in self.trials if len(trial.outcomes) >= rung and trial.outcomes[rung - 1].finished]
        everyone = [*rivals, *trials]
        if not everyone:
            return {}
        best = max(everyone, key=lambda trial: np.mean([outcome.score for outcome in trial.outcomes[:rung]]))
        top = self._rows(best, rung)
        reasons = {}
        for trial in trials:
            own = self._rows(trial, rung)
            if top is None or own is None:
                continue
            difference = top - own
            se = float(np.std(difference, ddof=1)) * math.sqrt(2.0 / len(difference))
            gap = float(np.mean(difference))
            if gap > _PRUNE_SE * se > 0.0:
                reasons[id(trial)] = f"after {rung} of {len(self.folds)} folds {gap / se:.1f} SE behind {best.name}"
        return reasons

    def _rows(self, trial: Trial, folds: int) -> Any:
        _, encoding = self.spec(trial.params)
        return row_scores(self.problem, self.folds[:folds], encoding, trial.outcomes[:folds])

    def _finish(self, trial: Trial) -> None:
        if not trial.outcomes:
            return
        trial.state = "pruned" if trial.reason else _state(trial.outcomes, len(self.folds))
        if trial.state == "diverged":
            trial.reason = f"the loss became non-finite on fold {len(trial.outcomes)}"
        elif trial.state == "out of time":
            trial.reason = f"the budget ended on fold {len(trial.outcomes)} of {len(self.folds)}"
        elif trial.state == "complete":
            stops = sorted({outcome.stopped for outcome in trial.outcomes})
            trial.reason = " and ".join(stops)

    def _add(self, key: str, trial: Trial) -> None:
        self._known[key] = trial
        trial.number = len(self.trials)
        self.clock.trials += 1
        self.trials.append(trial)
        self.say.done(trial)

    def _trial(self, params: Params, stage: str) -> Trial:
        spec, _ = self.spec(params)
        in_features = self._data(Encoding())[0].train.x.shape[1]
        size = _parameters(in_features, spec, max(1, self.out_features))
        return Trial(spec.hidden, size, [], "out of time", params=params, stage=stage)

    def _data(self, encoding: Encoding) -> list[trainer.FoldData]:
        if encoding not in self._encoded:
            self._encoded[encoding] = [encode_fold(self.problem, fold, encoding) for fold in self.folds]
        return self._encoded[encoding]

    def _deadline(self) -> float:
        # What remains after the fits on all rows, each of which costs a little more than one of its folds.
        cost, end, (candidates, share) = self._usual(), self.share * self.clock.end, self._held
        fits = self.final_fits * 1.5 * cost / len(self.folds)
        held = min(candidates * cost, share * end) if candidates else 0.0
        return end - fits - held - min(_WRAP_UP_SECONDS, 0.05 * end)

    def hold(self, candidates: float, share: float) -> None:
        """From now on keep what so many candidates like the best cost for later, but at most a share of the budget."""
        self._held = (candidates, share)

    def _usual(self) -> float:
        """What the best five candidates cost, in seconds of the clock: their median, since a process may be paused."""
        done = sorted((trial for trial in self.trials if trial.state == "complete"), key=lambda trial: -trial.mean)
        return self._rate * statistics.median([trial.seconds for trial in done[:5]] or [0.0])

    def _typical(self) -> float:
        recent = [trial.seconds for trial in self.trials[-5:]]
        return 0.7 * statistics.median(recent) * self._rate if recent else 0.0

    @property
    def _rate(self) -> float:
        """Seconds of the clock that pass in a second of a thread that trains, as measured so far."""
        clock, threads = self._spent
        return clock / threads if threads > _MEASURED_SECONDS else 1.0 / self._at_once

    @property
    def _at_once(self) -> int:
        """Thread seconds of a candidate that pass in a second of the clock; CPU time counts those of all threads."""
        return 1 if self.clock.budget.unit == "cpu-seconds" else min(self.threads, len(self.folds))

    def _cost(self, trial: Trial) -> float:
        """Seconds of the clock that it will take, by what the largest so far took."""
        largest = max(self.trials, key=_work)
        return self._rate * largest.seconds * _work(trial) / _work(largest)

    def _key(self, params: Params) -> str:
        return repr(self.spec(params))


def _every_second(rows: trainer.Split) -> trainer.Split:
    weight = None if rows.weight is None else rows.weight[::2] / rows.weight[::2].mean()
    return trainer.Split(rows.x[::2], rows.y[::2], weight)


def again(spec: Spec, number: int) -> Spec:
    """The same from another seed; 0 is its own."""
    return replace(spec, seed=spec.seed + _SEEDS_APART * number)


def make_spec(hidden: tuple[int, ...], rows: int, seed: int) -> Spec:
    """How a candidate is trained where nothing else is said: about 24 batches an epoch, of 32 to 256 rows each."""
    batch = min(256, max(32, 2 ** round(math.log2(max(1, rows / 24)))))
    return Spec(hidden, lr=_LR, weight_decay=_WEIGHT_DECAY, batch_size=batch, seed=seed)


def _state(outcomes: Sequence[trainer.Outcome], folds: int) -> State:
    if len(outcomes) == folds and all(outcome.finished for outcome in outcomes):
        return "complete"
    return "diverged" if outcomes and outcomes[-1].stopped == "diverged" else "out of time"


def _work(trial: Trial) -> float:
    """What a row costs, in units of a weight: an activation counts for some forty, a step of the optimizer for more."""
    return 1000.0 + trial.parameters + 40.0 * sum(trial.hidden)


def _parameters(in_features: int, spec: Spec, out_features: int) -> int:
    sizes = [in_features, *spec.hidden, out_features]
    norms = sum(spec.hidden) if spec.norm else 0  # A norm has two numbers a unit, its layer no bias.
    return sum((before + 1) * after for before, after in pairwise(sizes)) + norms
