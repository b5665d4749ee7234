"""After a bad forward: run it once more on a stand-in of the model, and see which module gave Inf or NaN first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlpkit.guard.census import Finding, first_bad

Autocast = Callable[[], AbstractContextManager[Any]]


class Arguments(NamedTuple):
    """Of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class MicroBatch:
    """One call of a step, kept until the step ends: what went in, the loss, and the random state before the forward."""

    inputs: Any
    target: Any
    loss: Tensor
    random_state: list[Tensor]


def call(model: nn.Module, inputs: Any) -> Any:
    """``model(**inputs)`` for a dict, ``model(*inputs)`` for a tuple or list, else ``model(inputs)``."""
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the CPU generator and, for a CUDA device, of its own. No sync."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put back what ``random_state`` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested tuples, lists and dicts, under one name."""
    return ((name, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def first_bad_module(
    model: nn.Module, batch: MicroBatch, device: torch.device, autocast: Autocast, *, itself: bool = False
) -> tuple[Finding | None, str]:
    """The first module, in order of return, whose output holds NaN or +Inf (else: any Inf); and a note where it failed.

    The stand-in shares the parameters and has its own buffers and attributes, so the model itself is not run again; the
    random state is that of the first run, and afterwards what it was. itself: run the model after all, whose buffers
    are then the caller's to restore; a sharded model cannot be copied.
    """
    try:
        stand_in = model if itself else copy.deepcopy(model, {id(one): one for one in model.parameters()})
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            set_random_state(batch.random_state, device)
            return _watched(stand_in, batch, autocast), ""
    except Exception as error:  # noqa: BLE001  (a model that cannot be copied or run twice must not end the training)
        return None, f"The forward could not be replayed ({type(error).__name__}: {error})."


def _watched(model: nn.Module, batch: MicroBatch, autocast: Autocast) -> Finding | None:
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

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with autocast():
            call(model, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            # FSDP2 leaves its root whole after a forward, for a backward that does not come.
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
    return next(iter(found + infinite), None)
