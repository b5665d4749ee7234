"""A population over several processes, one a GPU: each trains its share of the members, all know the scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mlpkit.errors import ArgumentError
from mlpkit.nn import MLP
from mlpkit.population.member import Member
from mlpkit.population.population import Population, ranked
from mlpkit.population.scores import Scores

_Value = TypeVar("_Value")
# What a step costs beside its products, as operations (csrc/ops/population_member.cpp has the same).
_STEP = 5e5


class ShardedPopulation:
    """``Population`` over the processes of ``torch.distributed``, as torchrun starts them, one a GPU.

    Every process makes it with the same members and tables and calls the same methods in the same order. Members are
    dealt out by their cost, dearest first, each to the process with the least so far; ``owners`` says to which. A
    member's numbers are those of one ``Population`` with all of them, on a device of the same kind, bit for bit.

    members, X, y and settings: as ``Population`` takes them: X (rows, in_features), y (rows,) or (rows, outputs).
    group: the process group; None: that of all processes. Without one, this process has all members. device: as there;
    "cuda" is the GPU of the process's local rank. ``local`` is the population of this process's own members, to save
    for example. Raises what ``Population`` raises, in the process where it happens; the others then wait for it until
    the group's timeout.
    """

    def __init__(
        self,
        members: Iterable[Member],
        X: Any,
        y: Any,
        *,
        group: Any = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> None:
        self.members = dict(enumerate(members))
        for member in self.members.values():
            if not isinstance(member, Member):
                raise ArgumentError(
                    f"ShardedPopulation: members holds {type(member).__name__}; it must hold Member objects"
                )
        self._group = group
        single = not (distributed.is_available() and distributed.is_initialized())
        self.rank = 0 if single else distributed.get_rank(group)
        self.size = 1 if single else distributed.get_world_size(group)
        costs = [cost(member, X) for member in self.members.values()]
        self.owners = dict(enumerate(dealt(costs, self.size)))
        self._mine = [index for index, owner in self.owners.items() if owner == self.rank]
        if device is not None and torch.device(device) == torch.device("cuda") and not single:
            device = f"cuda:{distributed.get_node_local_rank(fallback_rank=self.rank)}"
        self.local = Population(
            [self.members[index] for index in self._mine],
            X,
            y,
            device=device,
            progress=progress and self.rank == 0,
            **settings,
        )

    def fit(self) -> ShardedPopulation:
        """Train every member to its end. Returns itself."""
        self.local.fit()
        return self

    def train(self, epochs: int, *, stop: Callable[[], bool] | None = None) -> int:
        """Up to ``epochs`` more epochs of every member that is alive; returns the steps of all processes."""
        return sum(self._gathered(self.local.train(epochs, stop=stop)))

    @property
    def alive(self) -> list[int]:
        """Ids of the members that ``train`` would train, of all processes."""
        return sorted(itertools.chain(*self._gathered([self._mine[own] for own in self.local.alive])))

    @property
    def scores(self) -> dict[int, Scores]:
        """Learning curves and state of every member, by id."""
        own = {self._mine[index]: score for index, score in self.local.scores.items()}
        found = {index: score for part in self._gathered(own) for index, score in part.items()}
        return dict(sorted(found.items()))

    def ranking(self) -> list[int]:
        """Ids of validated members, the best metric first; those that diverged come last."""
        return ranked(self.scores, self.local.metric)

    def predict(self, X: Any, *, ids: int | Iterable[int] | None = None, weights: str = "best") -> Tensor:
        """Outputs (members, rows, outputs) float32 in every process, as ``Population.predict`` gives them.

        Raises ArgumentError for an id that is none.
        """
        wanted = list(self.members) if ids is None else self._known(ids)
        places = [place for place, index in enumerate(wanted) if self.owners[index] == self.rank]
        own = self.local.predict(X, ids=[self._mine.index(wanted[place]) for place in places], weights=weights)
        found: list[Tensor] = [torch.empty(0)] * len(wanted)
        for part_places, outputs in self._gathered((places, own)):
            for place, output in zip(part_places, outputs, strict=True):
                found[place] = output
        return torch.stack(found) if found else own

    def export(self, id: int, *, weights: str = "best") -> MLP:
        """The member as an ordinary ``nn.MLP`` in eval mode, in every process.

        Raises ArgumentError for an id that is none.
        """
        (index,) = self._known(id)
        mine = self.owners[index] == self.rank
        own = self.local.export(self._mine.index(index), weights=weights) if mine else None
        return next(model for model in self._gathered(own) if model is not None)

    def _known(self, ids: int | Iterable[int]) -> list[int]:
        wanted = [ids] if isinstance(ids, int) else list(ids)
        for index in wanted:
            if index not in self.members:
                raise ArgumentError(
                    f"ShardedPopulation: there is no member {index!r}; ids go from 0 to {len(self.members) - 1}"
                )
        return wanted

    def _gathered(self, value: _Value) -> list[_Value]:
        """What each process gave, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self._group)
        return found


def cost(member: Member, X: Any) -> float:
    """Operations of a member's whole training, roughly: what decides who trains it."""
    rows: int = len(member.rows) if member.rows is not None else len(X)
    widths: list[int] = [X.shape[1], *member.hidden, 1]
    parameters: float = sum(a * b for a, b in itertools.pairwise(widths))
    return member.epochs * (6.0 * parameters * rows + -(-rows // member.batch_size) * (_STEP + 16.0 * parameters))


def dealt(costs: Sequence[float], parts: int) -> list[int]:
    """A part for each cost, the dearest first and each to the part with the least so far."""
    sums, found = [0.0] * parts, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[index] = min(range(parts), key=lambda part: (sums[part], part))
        sums[found[index]] += costs[index]
    return found
