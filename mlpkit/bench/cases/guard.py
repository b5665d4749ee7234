"""What the guard costs where there are no kernels of ours to pay for it."""

from __future__ import annotations

from dataclasses import replace

from mlpkit.bench.case import OURS, Case, Rival, Settings
from mlpkit.bench.cases._network import Network
from mlpkit.bench.peak import Peaks


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """TrainStep on stock modules against the plain loop on the same: what safety costs."""
    return [
        _case(Network(8 if settings.quick else 256, width), settings)
        for width in ((8,) if settings.quick else (64, 256))
    ]


def _case(network: Network, settings: Settings) -> Case:
    def build() -> dict[str, Rival]:
        return {OURS: network.guarded(network.model().to_sequential()), "eager": Rival(network.eager())}

    return replace(network.case("guard", settings), build=build, note="the same stock modules on both sides")
