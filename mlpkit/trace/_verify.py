"""Verify: a program is run again with a proposal carried out, and the tracer says whether the failure is gone."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mlpkit.trace._diagnosis import Diagnosis
from mlpkit.trace._patch import CHANGES, Patch

_LOWER = 1e-3  # of the learning rate that was too high
_USUAL = 1e-3  # for a setting that is NaN or Inf
_SETTINGS = ("lr", "weight_decay", "momentum", "eps")


def verify(program: Callable[[], Any], diagnosis: Diagnosis) -> Diagnosis:
    """``diagnosis`` with each fix marked: true where the program, run with it, no longer fails by the same step.

    program: the same work again, from its start: it makes its own model, data and optimizer. It is run once for each
    proposal that can be carried out mechanically (a change of one line's call, or of the optimizer's settings), with
    the random state of now, which is put back. false: it still fails; None: no mechanical form, or the run raised.
    """
    if diagnosis.verdict != "failure":
        return diagnosis
    fixes = [{**fix, "verified": _holds(program, diagnosis, str(fix["kind"]))} for fix in diagnosis.fix]
    return replace(diagnosis, fix=fixes)


def _holds(program: Callable[[], Any], diagnosis: Diagnosis, kind: str) -> bool | None:
    from mlpkit.trace._tracer import Tracer

    applied = [0]
    tracer = Tracer()
    with _same_chance():
        try:
            with _carried_out(kind, diagnosis, applied), tracer:
                program()
        except Exception:  # noqa: BLE001 - whatever the changed program raises, the proposal has not been shown to hold
            return None
    if not applied[0]:
        return None
    found = tracer.diagnosis
    assert diagnosis.step is not None
    return found.verdict == "healthy" or (found.step is not None and found.step > diagnosis.step)


@contextmanager
def _carried_out(kind: str, diagnosis: Diagnosis, applied: list[int]) -> Iterator[None]:
    if kind in ("lower_lr", "hyperparameter"):
        seen: dict[int, float] = {}

        def mend(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                _mend(group, kind, seen)
            applied[0] += 1

        hook = register_optimizer_step_pre_hook(mend)
        try:
            yield
        finally:
            hook.remove()
    elif kind in CHANGES and diagnosis.location:
        patch = Patch(kind, diagnosis.location, short_name)
        with patch:
            yield
        applied[0] = patch.applied
    else:
        yield


def _mend(group: dict[str, Any], kind: str, seen: dict[int, float]) -> None:
    if kind == "hyperparameter":
        for name in _SETTINGS:
            value = group.get(name)
            if isinstance(value, float) and not np.isfinite(value):
                group[name] = _USUAL
        return
    for name in ("lr", "momentum"):
        value = group.get(name)
        if isinstance(value, float):
            lowered = value * _LOWER if name == "lr" else min(value, 0.9)
            known = seen.get(id(group)) if name == "lr" else lowered
            if value != known:
                group[name] = lowered
            if name == "lr":
                seen[id(group)] = float(group["lr"])


@contextmanager
def _same_chance() -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had been run."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def short_name(name: str) -> str:
    """A file as locations show it: relative to the working directory where it lies inside."""
    here = os.getcwd() + os.sep
    path = os.path.abspath(name) if os.path.exists(name) else name
    return path.removeprefix(here)
