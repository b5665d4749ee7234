"""Whole training steps of small networks."""

from __future__ import annotations

from itertools import product

from mlpkit.bench.case import Case, Settings
from mlpkit.bench.cases._network import Network
from mlpkit.bench.peak import Peaks


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """TrainStep on an MLP 128 -> w -> w -> 10 with dropout, Adam and clipping, against a loop with the same parts."""
    found = []
    for dtype in settings.dtypes:
        if dtype == "fp16":  # fp16 autocast of small products is nothing to train with on a CPU
            continue
        if settings.sizes:
            networks = [Network(sizes.rows, sizes.widths, dtype) for sizes in settings.sizes if sizes.family == "step"]
        else:
            shapes = [(8, 8)] if settings.quick else product((32, 256), (16, 64, 128, 256))
            networks = [Network.of_width(rows, width, dtype) for rows, width in shapes]
        found += [network.case("step", settings) for network in networks]
    return found
