"""Times of rivals in interleaved rounds, and the medians, minima and ratios made of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from mlpkit.bench.case import OURS, Rival, Settings, Times

CLOCKS = ("wall", "cpu")
MOST_REPEATS = 10_000
SHORTEST = 1e-9  # seconds: below the resolution of both clocks, so that no ratio divides by zero


def timed(rival: Rival, repeats: int, threads: int) -> dict[str, float]:
    """Seconds a call, over ``repeats`` calls in a row."""
    torch.set_num_threads(rival.threads or threads)
    call = rival.call
    # A collection would fall on whichever rival is running; as in timeit, none happens while the clock runs.
    enabled = gc.isenabled()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        if enabled:
            gc.enable()
    return {"wall": wall / repeats, "cpu": cpu / repeats}


def measure(rivals: Mapping[str, Rival], settings: Settings) -> Times:
    """Every rival once a round, beginning with another one each time, so that drift favours nobody."""
    repeats = {}
    for name, rival in rivals.items():
        timed(rival, 1, settings.threads)  # compiles, allocates, warms the caches
        once = min(timed(rival, 1, settings.threads)["wall"] for _ in range(2))
        repeats[name] = max(1, min(MOST_REPEATS, round(settings.seconds_a_round / max(once, SHORTEST))))
    times: Times = {name: [] for name in rivals}
    names = list(rivals)
    for index in range(settings.rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(rivals[name], repeats[name], settings.threads))
    torch.set_num_threads(settings.threads)
    return times


def summarise(times: Times, beside: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds of each rival, and how many times longer than ours it took: by rounds (median) and by minima.

    beside: rivals that get seconds, but no ratio.
    """
    seconds = {
        name: {
            clock: {
                "median": median(spent[clock] for spent in rounds),
                "minimum": min(spent[clock] for spent in rounds),
            }
            for clock in CLOCKS
        }
        for name, rounds in times.items()
    }
    ratio = {name: ratios(times, name, OURS) for name in times if name not in (OURS, *beside)}
    return {"seconds": seconds, "ratio": ratio}


def ratios(times: Times, slow: str, fast: str) -> dict[str, dict[str, float]]:
    """``slow`` over ``fast`` by each clock: the median of the rounds' own ratios, and the ratio of the minima."""
    found = {}
    for clock in CLOCKS:
        above = [spent[clock] for spent in times[slow]]
        below = [max(spent[clock], SHORTEST) for spent in times[fast]]
        by_round = median(a / b for a, b in zip(above, below, strict=True))
        found[clock] = {"median": by_round, "minimum": min(above) / min(below)}
    return found
