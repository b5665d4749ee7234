"""Whether a step was bad, exactly, and who made it so: asked only after a flag went up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mlpkit._events import announce, listened_to
from mlpkit.errors import NonFiniteError
from mlpkit.guard import headroom
from mlpkit.guard.census import Finding, Named, first_bad
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.replay import Autocast, MicroBatch, first_bad_module, tensors_in
from mlpkit.guard.scale import LossScale
from mlpkit.guard.state import Buffers, parameters_of, state_of


@dataclass
class Evidence:
    """What one step produced, for as long as it is undecided; ``updated``: whether the optimizer has been asked."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[MicroBatch]
    buffers: Buffers
    norm: Tensor | None = None
    updated: bool = False

    def verdict(self) -> tuple[str, Finding, int] | None:
        """(where, finding, micro-batch) of what went bad first on a step's way, or None: a false alarm. Syncs."""
        for index, batch in enumerate(self.batches):
            finding = first_bad([("loss", batch.loss)])
            if finding:
                return "loss", finding, index
        names = parameter_names(self.model)
        parameters = [(names[id(parameter)], parameter) for parameter in parameters_of(self.optimizer)]
        state = state_of(self.optimizer, names)
        places = {
            "gradient": first_bad(
                (name, parameter.grad) for name, parameter in parameters if parameter.grad is not None
            ),
            "norm": first_bad([("gradient norm", self.norm)] if self.norm is not None else []),
            "buffer": first_bad(self.buffers.named(), inf_allowed=self.buffers.sentinels),
            "update": first_bad([*parameters, *state]) if self.updated else None,
        }
        last = len(self.batches) - 1
        return next(((where, finding, last) for where, finding in places.items() if finding), None)


def bad_state(parameters: Named, state: Named, buffers: Buffers | None) -> tuple[str, Finding] | None:
    """(place, finding) of a parameter, optimizer state or buffer that holds Inf or NaN; None without any. Syncs."""
    places = {
        "parameter": first_bad(parameters),
        "optimizer state": first_bad(state),
        "buffer": first_bad(buffers.named(), inf_allowed=buffers.sentinels) if buffers else None,
    }
    return next(((place, finding) for place, finding in places.items() if finding), None)


def bad_state_error(owner: str, place: str, finding: Finding) -> NonFiniteError:
    """For state that was bad before the step: never skipped over."""
    return NonFiniteError(
        f"{owner}: {place} {finding.name!r} held {finding.count} {finding.kind} before the step; "
        "skipping cannot heal it, so go back to a good checkpoint"
    )


def bad_state_of(model: nn.Module, optimizer: torch.optim.Optimizer, buffers: Buffers) -> tuple[str, Finding] | None:
    """``bad_state`` of all parameters of a model."""
    names = parameter_names(model)
    return bad_state(((names[id(p)], p) for p in model.parameters()), state_of(optimizer, names), buffers)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Qualified names by identity, without the wrapper that ``torch.compile`` adds."""
    return {id(parameter): name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}


def names_or_places(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[int, str]:
    """Names of an optimizer's parameters by identity; ``group 0, parameter 3 (8, 5)`` of those that have none."""
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            place = f"group {index}, parameter {position} {tuple(parameter.shape)}"
            found[id(parameter)] = names.get(id(parameter), place)
    return found


def forward_culprit(
    model: nn.Module,
    batch: MicroBatch,
    finding: Finding,
    device: torch.device,
    autocast: Autocast,
    *,
    together: bool = False,
    itself: bool = False,
) -> tuple[str, str, Finding, str]:
    """Trace a bad loss back: (where, culprit, finding, note). Bad data first, then the forward again by modules.

    together: every rank runs the forward again, whatever its own data hold, for one that communicates waits for the
    others. itself: see ``first_bad_module``.
    """

    def again() -> tuple[Finding | None, str]:
        return first_bad_module(model, batch, device, autocast, itself=itself)

    found, note = again() if together else (None, "")
    for where, value in (("inputs", batch.inputs), ("target", batch.target)):
        bad = first_bad(tensors_in(where, value))
        if bad:
            return where, where, bad, ""
    if not together:
        found, note = again()
    if found is None:
        return "loss", "loss", finding, note
    return "forward", f"forward of {found.name or 'the model'}", found, note


def make_record(
    step: int,
    verdict: tuple[str, Finding, int],
    evidence: Evidence,
    scale: float,
    trace_forward: Callable[[MicroBatch, Finding], tuple[str, str, Finding, str]],
) -> SkipRecord:
    """The record of a skipped step; asks ``trace_forward`` when the loss itself is bad."""
    where, finding, index = verdict
    culprit, note = finding.name, ""
    batch = evidence.batches[index]
    if where == "loss":
        where, culprit, finding, note = trace_forward(batch, finding)
    return SkipRecord.of(
        finding,
        step=step,
        where=where,
        parameters=len(parameters_of(evidence.optimizer)),
        scale=scale,
        loss=float(batch.loss),
        micro_batch=index,
        culprit=culprit,
        note=note,
    )


def explained(record: SkipRecord, scale: LossScale | None, absmax: tuple[float, ...]) -> SkipRecord:
    """The record with what kind of skip it was, the culprit's past absmax, and what a tracer knows of its origin."""
    at_floor = scale is None or scale.at_floor
    note = record.note
    if scale is not None and at_floor and record.where == "gradient":
        note = "The scale is at its floor: these gradients overflow without its help."
    origin = announce("skip", step=record.step) if listened_to() else {}
    return replace(
        record,
        note=note,
        nature=headroom.nature(record.where, record.scale, at_floor),
        absmax=absmax,
        module=origin.get("module"),
        op=origin.get("op"),
        cause=origin.get("cause"),
    )
