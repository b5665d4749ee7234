"""Calls of a watched step, held so that they can be run again under observe before the optimizer changes anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mlpkit import _C

if TYPE_CHECKING:
    from mlpkit.trace._tracer import Tracer


class Held:
    """One call of a root module: its inputs, the random state, and the gradient that came back."""

    def __init__(
        self,
        root: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: Sequence[torch.Tensor],
    ) -> None:
        self.root, self.args, self.kwargs = root, args, kwargs
        self.random = torch.get_rng_state()
        self.graph = torch.is_grad_enabled()
        self.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.gradient: torch.Tensor | None = None
        values = (*args, *kwargs.values())
        self._inputs = [one for one in values if isinstance(one, torch.Tensor) and not one.is_inference()]
        self._inputs += parameters
        self._versions = [value._version for value in self._inputs]

    def listen(self, output: Any) -> None:
        """Keep the gradient that arrives at the output."""
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(self._keep)  # type: ignore[no-untyped-call]

    def _keep(self, gradient: torch.Tensor) -> None:
        self.gradient = gradient

    def changed(self) -> bool:
        """Whether inputs or parameters were changed in place since the call."""
        return self._versions != [value._version for value in self._inputs]

    def replay(self, tracer: Tracer) -> None:
        """Run the call, and its backward where a gradient came back, under a tracer; leaves everything as it was."""
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.root.buffers()]
        enabled, dtype = self.autocast
        try:
            with (
                torch.random.fork_rng(devices=[]),
                tracer,
                torch.set_grad_enabled(self.graph),
                torch.autocast("cpu", dtype=dtype, enabled=enabled),
            ):
                torch.set_rng_state(self.random)
                output = self.root(*self.args, **self.kwargs)
                tracer._reached(_tensors(output), "loss")
                came_back = _C.peaks([self.gradient])[0]
                if 0 <= came_back < math.inf and isinstance(output, torch.Tensor):
                    assert self.gradient is not None
                    _backward(self.root, output, self.gradient, tracer)
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _backward(root: torch.nn.Module, output: torch.Tensor, gradient: torch.Tensor, tracer: Tracer) -> None:
    leaves = {name: one for name, one in root.named_parameters() if one.requires_grad}
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient, allow_unused=True)
    tracer._reached([one for one in gradients if one is not None], "gradient")


def _tensors(output: Any) -> Sequence[torch.Tensor]:
    values = output if isinstance(output, (list, tuple)) else [output]
    return [value for value in values if isinstance(value, torch.Tensor)]
