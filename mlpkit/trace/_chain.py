"""The chain of a diagnosis: explosion, saturation, contamination, invalidation, persistence, with operations."""

from __future__ import annotations

from itertools import pairwise

from mlpkit.trace._records import Incident, Link, OpRecord

_MIDDLE = 4  # contaminated modules named between the root and the sink


def links(record: OpRecord, incident: Incident) -> list[Link]:
    """From the root to the record in which the bad value mattered."""
    path = _path(record, incident)
    chain = list(incident.links)
    root = incident.root
    if root is not None and root.underflow is not None:
        chain.append(_link(root, "saturation", "underflow", root.underflow.text))
    first = path[0]
    finding = incident.finding
    stage = "contamination" if finding.cause == "external" else _birth_stage(first)
    chain.append(_link(first, stage, finding.cause, finding.text))
    middle: list[Link] = []
    for before, here in pairwise(path):
        if here.finding is not None:
            middle.append(_link(here, "invalidation", here.finding.cause, here.finding.text))
        elif (here.place.module, here.place.phase) != (before.place.module, before.place.phase):
            middle.append(_link(here, "contamination", "", f"{here.value} passed on"))
    return chain + _shortened(middle)


def _birth_stage(record: OpRecord) -> str:
    return "invalidation" if record.value == "NaN" else "saturation"


def _path(record: OpRecord, incident: Incident) -> list[OpRecord]:
    path = [record]
    while path[-1] is not incident.record and path[-1].bad_parent is not None and len(path) < 4096:
        path.append(path[-1].bad_parent)
    if path[-1] is not incident.record:
        path.append(incident.record)
    return path[::-1]


def _shortened(middle: list[Link]) -> list[Link]:
    """Every invalidation stays; of mere passing on, the first few."""
    kept, passed = [], 0
    for link in middle:
        passed += link.stage == "contamination"
        if link.stage != "contamination" or passed <= _MIDDLE:
            kept.append(link)
    return kept


def _link(record: OpRecord, stage: str, cause: str, detail: str) -> Link:
    place = record.place
    return Link(place.step, place.phase, record.op, place.module, stage, cause, detail)
