"""``MlpkitCallback`` for Hugging Face's Trainer: traces a run, and guards it under ``fp16=True``."""

from __future__ import annotations

from typing import Any

import torch

from mlpkit.guard import GradScaler
from mlpkit.interop._companion import Companion
from mlpkit.report._extras import require

_Callback: Any = require("transformers", "mlpkit.interop.transformers", "interop").TrainerCallback


class MlpkitCallback(Companion, _Callback):
    """``trainer.add_callback(MlpkitCallback(trainer))`` traces ``train``; afterwards ``.diagnosis`` and ``.records``.

    With ``fp16=True`` in one process the scaler of ``trainer.accelerator`` and of its optimizers becomes a
    ``guard.GradScaler``: a step that would bring Inf or NaN into parameters, optimizer state or registered buffers is
    skipped without a trace. Elsewhere (float32, bf16, more processes, DeepSpeed, FSDP) it warns that it guards nothing,
    and still traces. A Trainer tells no callback of an exception: after one, call ``close()`` to end the trace.

    trace: a level of ``trace.Tracer`` ("observe", "watch"), or None. guard: whether the scaler is replaced. out: a
    folder for ``diagnosis.json``. Further settings are those of ``guard.GradScaler`` that torch's lacks. Raises
    ArgumentError for arguments that do not fit; importing the module without transformers raises MissingExtraError.
    """

    def __init__(self, trainer: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the guarded scaler where torch's is, and begin the trace."""
        model = self._trainer.model
        if self._guard:
            self._swap(model)
        self._begin(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step of the trace."""
        self._next_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the trace."""
        self.close()

    def _swap(self, model: torch.nn.Module) -> None:
        accelerator = self._trainer.accelerator
        why_not = ""
        if accelerator.scaler is None:
            why_not = f"mixed precision is {accelerator.mixed_precision!r}, and only 'fp16' has a scaler"
        elif accelerator.num_processes > 1:
            why_not = f"the run has {accelerator.num_processes} processes"
        scaler = self._guarded(accelerator.scaler, model, why_not, _Scaler)
        if scaler is None:
            return
        accelerator.scaler = scaler
        scaler.wrappers = {id(wrapper.optimizer): wrapper for wrapper in accelerator._optimizers}
        for wrapper in accelerator._optimizers:
            wrapper.scaler = scaler


class _Scaler(GradScaler):
    """A guarded scaler for accelerate, which counts a step as taken where the optimizer's ``step`` was called."""

    wrappers: dict[int, Any]

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As GradScaler's; tells accelerate what became of the step, which may be taken back or be a native call."""
        skips = len(self.records)
        value = super().step(optimizer, *(() if args == (None,) else args), **kwargs)
        self.wrappers[id(optimizer)]._accelerate_step_called = len(self.records) == skips
        return value
