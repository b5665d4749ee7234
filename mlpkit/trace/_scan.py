"""One census per tensor, reduced to what the tracer asks."""

from __future__ import annotations

import torch

import mlpkit.ops.census  # noqa: F401 - registers the operator
from mlpkit.trace._records import Scan


def scan(tensor: torch.Tensor) -> Scan:
    """Counts and absmax of a tensor; a CUDA tensor is counted on the host."""
    counts, extremes, _ = torch.ops.mlpkit.census([tensor.detach().cpu()])
    nan, posinf, neginf, zero, _, _, _, first = counts[0].tolist()
    return Scan(nan, posinf, neginf, zero, extremes[0, 0].item(), first)
