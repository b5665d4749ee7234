"""What dropout costs: our own layer and our own step with p = 0.1 beside p = 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mlpkit.bench.case import OURS, Case, Rival, Settings
from mlpkit.bench.cases._layer import QUICK_SHAPE, Layer
from mlpkit.bench.cases._network import Network
from mlpkit.bench.peak import Peaks

NO_DROPOUT = "mlpkit p=0"


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """Our own layer and training step with dropout 0.1 beside the same without."""
    found = []
    for shape in [QUICK_SHAPE] if settings.quick else [(1024, 128, 256), (1024, 128, 4096)]:
        layer = Layer(shape, "fp32", backward=True)
        found.append(_against_none(layer.case("dropout", settings), layer.ours))
    for width in (8,) if settings.quick else (16, 64, 256):
        network = Network.of_width(rows=8 if settings.quick else 256, width=width)
        found.append(_against_none(network.case("dropout", settings), network.ours))
    return found


def _against_none(case: Case, ours: Callable[[float], Rival]) -> Case:
    def build() -> dict[str, Rival]:
        return {OURS: ours(0.1), NO_DROPOUT: ours(0.0)}

    return replace(case, build=build, baseline=NO_DROPOUT, note="below 1 by what dropout costs")
