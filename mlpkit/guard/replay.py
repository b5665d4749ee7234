"""After a bad forward: run it once more on a stand-in of the model, and see which module gave Inf or NaN first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlpkit.guard.census import Finding, first_bad

Call = Callable[[nn.Module, Any], Any]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class MicroBatch:
    """One call of a step, kept until the step ends: what went in, the loss, and the random state before the forward."""

    inputs: Any
    target: Any
    loss: Tensor
    random_state: list[Tensor]


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the CPU generator and, for a CUDA device, of its own. No sync."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested tuples, lists and dicts, under one name."""
    return ((name, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def first_bad_module(
    model: nn.Module, batch: MicroBatch, device: torch.device, call: Call, autocast: Autocast
) -> tuple[Finding | None, str]:
    """The first module, in order of return, whose output holds NaN or +Inf (else: any Inf); and a note where it failed.

    The stand-in shares the parameters and has its own buffers and attributes, so the model itself is not run again; the
    random state is that of the first run, and afterwards what it was.
    """
    try:
        stand_in = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.set_rng_state(batch.random_state[0])
            if device.type == "cuda":
                torch.cuda.set_rng_state(batch.random_state[1], device)
            return _watched(stand_in, batch, call, autocast), ""
    except Exception as error:  # noqa: BLE001  (a model that cannot be copied or run twice must not end the training)
        return None, f"The forward could not be replayed ({type(error).__name__}: {error})."


def _watched(model: nn.Module, batch: MicroBatch, call: Call, autocast: Autocast) -> Finding | None:
    found: list[Finding] = []
    infinite: list[Finding] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if found:
                return
            bad = first_bad(tensors_in(name, output))
            if bad is None:
                return
            # -Inf alone may be a mask that is meant; it is named only if nothing worse turns up.
            worse = bad.nans or any(bool((leaf == torch.inf).any()) for _, leaf in tensors_in(name, output))
            (found if worse else infinite).append(bad)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name))
    with autocast():
        call(model, batch.inputs)
    return next(iter(found + infinite), None)
