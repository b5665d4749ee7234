"""What a ``GradScaler`` writes down of a step that it skipped, and state that no skip can heal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlpkit._events import announce
from mlpkit.guard import headroom
from mlpkit.guard.attempt import Verdict
from mlpkit.guard.census import first_bad
from mlpkit.guard.culprit import bad_state, bad_state_error
from mlpkit.guard.gate import Gate
from mlpkit.guard.ranks import Ranks
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.scaled_losses import ScaledLosses
from mlpkit.guard.state import parameters_of, state_of


def refuse_bad_state(
    owner: str, optimizer: torch.optim.Optimizer, names: dict[int, str], gate: Gate | None, ranks: Ranks | None
) -> None:
    """Raises NonFiniteError naming a parameter, state or buffer that holds Inf or NaN, on any rank; after a skip."""
    parameters = ((names[id(parameter)], parameter) for parameter in parameters_of(optimizer))
    found = bad_state(parameters, state_of(optimizer, names), gate.buffers if gate else None)
    found = ranks.common(found) if ranks else found
    if found:
        raise bad_state_error(owner, *found)


@dataclass
class Skip:
    """found: whether the scaled gradients themselves held Inf or NaN."""

    verdict: Verdict
    step: int
    scale: float
    at_floor: bool
    found: bool

    def record(self, losses: ScaledLosses, gate: Gate | None, ranks: Ranks | None, parameters: int) -> SkipRecord:
        """Without the culprit's past; asks the model for the origin of a loss that was bad, and listeners."""
        where, finding = self.verdict
        culprit, note = finding.name, ""
        bad_loss = first_bad(("loss", loss) for loss in losses.suspects())
        if bad_loss and where in ("gradient", "loss"):
            if gate is not None and ranks is not None and ranks.alone:
                place, name, origin, note = gate.culprit(bad_loss)
                if place != "loss":
                    where, culprit, finding = place, name, origin
            if where == "gradient":
                note = f"The loss itself was not finite: no scale can help. {note}".strip()
        elif where == "norm":
            note = "Clipping by it made every gradient zero."
        elif where == "gradient" and self.at_floor:
            note = "The scale is at its floor: these gradients overflow without its help."
        # What went bad after it was unscaled is not the scale's doing, as nothing is of a scale at its floor.
        beyond_scale = self.at_floor or not self.found
        nature = headroom.nature("loss" if bad_loss and where == "gradient" else where, self.scale, beyond_scale)
        event = announce("skip", step=self.step)
        announce("step", step=self.step, skipped=True, culprit=culprit, scale=self.scale, parameters=parameters)
        return SkipRecord.of(
            finding,
            step=self.step,
            where=where,
            parameters=parameters,
            scale=self.scale,
            loss=losses.worst(),
            culprit=culprit,
            note=note,
            nature=nature,
            rank=ranks.guilty if ranks else None,
            module=event.get("module"),
            op=event.get("op"),
            cause=event.get("cause"),
        )
