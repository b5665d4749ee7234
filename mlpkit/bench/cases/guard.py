"""What the guard costs where there are no kernels of ours to pay for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mlpkit import guard
from mlpkit.bench.case import OURS, Case, Rival, Settings
from mlpkit.bench.cases._network import Network
from mlpkit.bench.peak import Peaks


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """TrainStep on stock modules against the plain loop on the same: what safety costs."""
    found = [
        _case(Network.of_width(8 if settings.quick else 256, width), settings)
        for width in ((8,) if settings.quick else (64, 256))
    ]
    return [*found, _transformer(16, 1) if settings.quick else _transformer(512, 6)]


def _case(network: Network, settings: Settings) -> Case:
    def build() -> dict[str, Rival]:
        return {OURS: network.guarded(network.model().to_sequential()), "eager": Rival(network.eager())}

    return replace(network.case("guard", settings), build=build, note="the same stock modules on both sides")


def _transformer(width: int, layers: int) -> Case:
    """An encoder of 20 million parameters, ours with guard.optim.AdamW."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        # Another copy for each layer, without the path that stacks them for inference.
        encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        return nn.Sequential(nn.Embedding(2 * width, width), encoder, nn.Linear(width, 2 * width), _ByClass())

    def build() -> dict[str, Rival]:
        torch.manual_seed(1)
        tokens, target = torch.randint(2 * width, (4, 64)), torch.randint(2 * width, (4, 64))
        network, other = model(), model()
        ours = guard.optim.AdamW(network.parameters(), lr=1e-5)
        step = guard.TrainStep(network, nn.functional.cross_entropy, ours)
        plain = torch.optim.AdamW(other.parameters(), lr=1e-5, fused=True)

        def loop() -> None:
            plain.zero_grad()
            nn.functional.cross_entropy(other(tokens), target).backward()  # type: ignore[no-untyped-call]
            plain.step()

        return {OURS: Rival(lambda: step(tokens, target)), "eager": Rival(loop)}

    return Case(
        family="guard",
        label=f"transformer encoder, {layers} x {width}, 4 x 64 tokens",
        sizes={"rows": 256, "width": width, "layers": layers},
        what="training step",
        dtype="fp32",
        work=0.0,
        build=build,
        note="guard.optim.AdamW against torch's fused AdamW, no clipping",
    )


class _ByClass(nn.Module):
    """(rows, tokens, classes) as cross-entropy takes it: (rows, classes, tokens)."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.transpose(1, 2)
