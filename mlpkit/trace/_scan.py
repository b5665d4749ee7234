"""One census per tensor, reduced to what the tracer asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import mlpkit.ops.census  # noqa: F401 - registers the operator
from mlpkit.trace._records import Scan

_census = torch.ops.mlpkit.census.default


def scan(tensor: torch.Tensor) -> Scan:
    """Counts and absmax of a tensor."""
    return scan_all([tensor])[0]


def scan_all(tensors: Sequence[torch.Tensor]) -> list[Scan]:
    """The same for several tensors at once; CUDA tensors are counted on the host."""
    counts, extremes, _ = _census([tensor if tensor.is_cpu else tensor.cpu() for tensor in tensors])
    return [
        Scan(nan, posinf, neginf, zero, absmax, first)
        for (nan, posinf, neginf, zero, _, _, _, first), (absmax, _) in zip(counts.tolist(), extremes.tolist())
    ]
