"""Running a model once without a trace of it: what the check and the search share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a tensor, tuple or dict."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def buffers_and_random_state_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers and torch's random state are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cuda = sorted({tensor.device.index for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
