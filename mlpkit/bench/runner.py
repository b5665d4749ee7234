"""Runs cases and makes the results of them: a dict as it is written to the JSON file, schema version 2."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mlpkit.bench.case import OURS, Case, Settings, Times
from mlpkit.bench.cases import FAMILIES, chosen
from mlpkit.bench.machine import environment, load
from mlpkit.bench.measure import measure, summarise
from mlpkit.bench.peak import Peaks
from mlpkit.report import write_whole

SCHEMA = 2


def run(
    names: Sequence[str] = (), settings: Settings | None = None, show: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Measure the families ``names`` (none: all) and return the results; ``show`` is given each row as it is done.

    Raises ArgumentError for an unknown family. torch's number of threads and random state are as before afterwards.
    """
    settings = settings or Settings()
    families = chosen(names)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    begin = time.monotonic()
    try:
        torch.set_num_threads(settings.threads)
        results: dict[str, Any] = {"schema": SCHEMA, "environment": environment(settings), "cases": [], "skipped": []}
        peaks = Peaks(settings)
        for name in families:
            found = FAMILIES[name](settings, peaks)
            if not found:
                results["skipped"].append(f"{name}: nothing to measure with this machine and these options")
            for case in found:
                results["cases"].append(row(case, settings, peaks))
                if show is not None:
                    show(results["cases"][-1])
        results["peaks"] = peaks.to_dict()
        results["environment"] |= {"seconds": round(time.monotonic() - begin, 1), "load_after": load()}
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    return results


def row(case: Case, settings: Settings, peaks: Peaks) -> dict[str, Any]:
    """Measure one case."""
    rivals = case.build()
    found = finished(case, measure(rivals, settings), settings, peaks)
    return found | {"about": {name: rival.about() for name, rival in rivals.items() if rival.about is not None}}


def finished(case: Case, times: Times, settings: Settings, peaks: Peaks) -> dict[str, Any]:
    """The row of a case made of its times: facts, seconds, ratios, and the share of the floor."""
    clock, threads = case.clock or settings.clock, case.threads or settings.threads
    found = case.facts() | {"threads": threads, "clock": clock} | summarise(times, case.beside)
    if case.work:
        # The floor is made of one thread's peak: what a second core fails to give is not taken off it.
        least = case.work / (peaks.of(case.dtype)["flops_per_second"] * threads)
        found["floor"] = {"seconds": least, "share": least / max(found["seconds"][OURS][clock]["minimum"], 1e-9)}
    if case.derive is not None:
        found |= case.derive(times)
    return found


def write(results: dict[str, Any], path: Path) -> None:
    """Write the JSON file whole or not at all."""
    write_whole(path, json.dumps(results, indent=1) + "\n")
