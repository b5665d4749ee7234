"""What a second thread brings, beside what the machine has to give."""

from __future__ import annotations

import os
from dataclasses import replace
from statistics import median

from mlpkit.bench.case import OURS, Case, Rival, Settings, Times
from mlpkit.bench.cases._layer import QUICK_SHAPE, Layer
from mlpkit.bench.peak import Peaks

ONE, PROBE, PROBE_ONE = "mlpkit, 1 thread", "probe, 2 threads", "probe, 1 thread"


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """Two threads against one, beside a probe that gives each thread a product of its own."""
    if (os.cpu_count() or 1) < 2:
        return []
    shapes = [QUICK_SHAPE] if settings.quick else [(1024, 128, 4096), (512, 1024, 1024)]
    return [_case(Layer(shape, "fp32", backward), settings, peaks) for shape in shapes for backward in (False, True)]


def _case(layer: Layer, settings: Settings, peaks: Peaks) -> Case:
    def build() -> dict[str, Rival]:
        run = layer.ours().call
        return {
            OURS: Rival(run, threads=2),
            ONE: Rival(run, threads=1),
            PROBE: peaks.probe("fp32", 2),
            PROBE_ONE: peaks.probe("fp32", 1),
        }

    # Only wall time shows what a thread gains: CPU time adds the threads up.
    case = layer.case("threads", settings)
    return replace(case, build=build, baseline=ONE, threads=2, clock="wall", beside=(PROBE, PROBE_ONE), derive=gains)


def gains(times: Times) -> dict[str, float]:
    """Times faster with two threads, ours and the probe's (which does twice the work in it), by wall time."""
    wall = {name: [spent["wall"] for spent in rounds] for name, rounds in times.items()}
    ours = median(one / two for one, two in zip(wall[ONE], wall[OURS], strict=True))
    probe = median(2 * one / two for one, two in zip(wall[PROBE_ONE], wall[PROBE], strict=True))
    return {"gain": ours, "probe_gain": probe, "of_probe": ours / probe}
