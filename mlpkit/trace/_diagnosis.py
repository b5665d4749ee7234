"""The answer: a verdict with op, module, step, cause, chain, evidence, fix, and a first sentence that stands alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mlpkit.trace._fix import proposals
from mlpkit.trace._numbers import short
from mlpkit.trace._records import Incident, Link

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """One finding of a trace; ``to_dict()`` is an entry of ``diagnosis.json``, schema version 1.

    verdict: ``failure``, ``warning``, ``benign`` or ``healthy``. op, step, phase, module, location and cause name the
    root. node: the autograd node, for backward. All of these are None in a healthy verdict.
    """

    verdict: str
    sentence: str
    step: int | None = None
    phase: str | None = None
    op: str | None = None
    module: str | None = None
    location: str | None = None
    node: str | None = None
    cause: str | None = None
    dtype: str | None = None
    chain: list[dict[str, Any]] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    fix: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: numbers that JSON cannot hold are the strings "NaN", "Inf" and "-Inf"."""
        plain = _plain({"schema_version": SCHEMA_VERSION, **asdict(self)})
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        return self.sentence

    def _repr_html_(self) -> str:
        from mlpkit.trace._terminal import markup

        return markup(self)

    def __rich__(self) -> Group:
        """Sentence, chain, evidence and fixes, for ``rich.print`` and notebooks with rich."""
        from mlpkit.trace._terminal import view

        return view(self)


def healthy(steps: int, operations: int, raised: str | None = None) -> Diagnosis:
    """The verdict of a run in which no NaN or Inf mattered; raised: the exception that ended it, by name."""
    count = "1 step" if steps == 1 else f"{steps} steps"
    sentence = (
        f"No failure in {count}: in {operations} operations no NaN or Inf reached a loss, parameter, optimizer state, "
        "buffer or returned value."
        if operations
        else "Nothing to check: no operation on floating-point tensors was seen."
    )
    if raised:
        sentence += f" The program ended with {raised}."
    return Diagnosis("healthy", sentence, evidence={"steps": steps, "operations": operations})


def diagnose(incident: Incident) -> Diagnosis:
    """The diagnosis of one incident."""
    root = incident.root or incident.record
    finding = root.underflow if incident.root is not None and root.underflow is not None else incident.finding
    place = root.place
    cause = incident.root_cause or incident.finding.cause
    evidence = {
        "index": finding.index,
        "shape": finding.shape,
        "operands": finding.operands,
        "value": finding.value,
        "exact": finding.exact,
        "limit": finding.limit,
        "rule": incident.finding.cause,
        "text": finding.text,
        "absmax_history": [list(pair) for pair in incident.history[-64:]],
        "reached": [{"kind": s.kind, "name": s.name, "step": s.place.step} for s in incident.sinks],
        "repeats": incident.repeats,
    }
    if incident.root_text:
        evidence["root"] = incident.root_text
    if incident.scale is not None:
        evidence["loss_scale"] = incident.scale
    return Diagnosis(
        "failure" if incident.live else "benign",
        _sentence(incident),
        place.step,
        place.phase,
        root.op,
        place.module,
        place.location,
        place.node or None,
        cause,
        root.dtype,
        [asdict(link) for link in _chain(incident)],
        evidence,
        proposals(incident),
    )


def _chain(incident: Incident) -> list[Link]:
    chain = list(incident.links)
    if not incident.sinks and not any(link.stage in ("saturation", "invalidation") for link in chain):
        place, finding = incident.record.place, incident.finding
        stage = "invalidation" if finding.value == "NaN" else "saturation"
        chain.append(
            Link(place.step, place.phase, incident.record.op, place.module, stage, finding.cause, finding.text)
        )
    for kind in ("parameter", "optimizer state", "buffer"):
        sinks = [sink for sink in incident.sinks if sink.kind == kind]
        if sinks:
            place = sinks[0].place
            more = f" and {len(sinks) - 1} more" if len(sinks) > 1 else ""
            detail = f"{kind} `{sinks[0].name}`{more} written"
            chain.append(Link(place.step, place.phase, sinks[0].op, place.module, "persistence", "", detail))
    return chain


def _sentence(incident: Incident) -> str:
    root = incident.root or incident.record
    finding = incident.finding
    cause = incident.root_cause or finding.cause
    place = root.place
    where = f"{place.phase} of `{place.module}`" if place.module else place.phase
    location = f" ({place.location})" if place.location else ""
    begin = f"Step {place.step}, {where}{location}: "
    if finding.cause == "external" and not incident.still:
        what = f"{root.op} in {root.dtype} {finding.text}" if not root.subject else f"{root.op} {finding.text}"
        text = f"{begin}{what} ({cause})"
    elif incident.root is not None and root.underflow is not None:
        later = incident.record
        text = (
            f"{begin}{root.op} in {root.dtype} gave 0; {root.underflow.text} ({cause}), "
            f"then {later.op} gave {finding.value}: {finding.text}"
        )
    else:
        text = f"{begin}{root.op} in {root.dtype} gave {finding.value}; {_explained(incident)}"
    if incident.still:
        text += f"; {incident.still}"
    return text + _ending(incident)


def _explained(incident: Incident) -> str:
    finding = incident.finding
    text = finding.text or "the result is not finite"
    if incident.root_cause and incident.root_cause != finding.cause:
        return f"{text} ({finding.cause}); root: {incident.root_text} ({incident.root_cause})"
    return f"{text} ({finding.cause})"


def _ending(incident: Incident) -> str:
    if incident.skipped:
        return f". Step skipped; {incident.saved} parameters were saved."
    if incident.calibration:
        return f"; the loss scale {short(incident.scale or 0.0)} was being calibrated (benign)."
    if not incident.sinks:
        return "; it reached no loss, parameter, optimizer state, buffer or returned value (benign)."
    return "."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return short(value)
    return value
