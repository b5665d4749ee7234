"""The losses that went through a scaler: remembered to tell a scale that is too high from a forward that is broken."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

_MOST = 256  # that are looked at together, between two updates


class ScaledLosses:
    """Those of one iteration, and among them those whose backward the next optimizer step follows."""

    def __init__(self) -> None:
        self._all: deque[Tensor] = deque(maxlen=_MOST)
        self._fed: deque[Tensor] = deque(maxlen=_MOST)
        self._stepped = False  # since the last backward

    def watch(self, outputs: Any) -> None:
        """Remember the losses in a tensor, or in lists of tensors: their values now, whatever becomes of them."""
        if isinstance(outputs, Tensor):
            if outputs.numel() and outputs.is_floating_point():
                seen = outputs.detach()
                # A copy: the caller may change the loss in place.
                seen = seen.reshape(()).clone() if seen.numel() == 1 else seen.abs().amax()
                self._all.append(seen)
                if outputs.grad_fn is not None:
                    outputs.grad_fn.register_prehook(partial(self._feed, seen))
        elif isinstance(outputs, (list, tuple)):
            for output in outputs:
                self.watch(output)

    def watched(self, outputs: Iterable[Any]) -> Iterator[Any]:
        """The same outputs, each remembered as it passes."""
        for output in outputs:
            self.watch(output)
            yield output

    def step(self) -> tuple[Tensor, ...]:
        """An optimizer steps: the losses whose gradients it gets."""
        self._stepped = True
        return tuple(self._fed)

    def suspects(self) -> list[Tensor]:
        """Those that the step went back to, or all where none is known to be."""
        return list(self._fed or self._all)

    def last(self) -> Tensor:
        """The latest; NaN where there is none."""
        return self._all[-1] if self._all else torch.tensor(torch.nan)

    def worst(self) -> float:
        """The first suspect that is not finite, else the last one. Syncs."""
        losses = [float(loss) for loss in self.suspects()] or [math.nan]
        return next((loss for loss in losses if not math.isfinite(loss)), losses[-1])

    def clear(self) -> None:
        """The iteration is over."""
        self._all.clear()
        self._fed.clear()

    def _feed(self, loss: Tensor, _: Any) -> None:
        """Its backward begins. The first one after a step is another optimizer's, as in a loop of two networks."""
        if self._stepped:
            self._fed.clear()
            self._stepped = False
        self._fed.append(loss)
