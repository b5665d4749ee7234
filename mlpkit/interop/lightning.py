"""``MlpkitCallback`` for Lightning's Trainer: traces a fit, and guards it under ``precision="16-mixed"``."""

from __future__ import annotations

from typing import Any

from mlpkit.guard import GradScaler
from mlpkit.interop._companion import Companion
from mlpkit.report._extras import require

_Callback: Any = require("lightning", "mlpkit.interop.lightning", "interop").pytorch.Callback


class MlpkitCallback(Companion, _Callback):
    """``Trainer(callbacks=[MlpkitCallback()])`` traces ``fit``; afterwards ``callback.diagnosis`` and ``.records``.

    Under ``"16-mixed"`` in one process the precision plugin's scaler becomes a ``guard.GradScaler``: a step that would
    bring Inf or NaN into parameters, optimizer state or registered buffers is skipped without a trace. Elsewhere
    (float32, bfloat16, more processes, manual optimization) it warns that it guards nothing, and still traces.
    A step of the trace is an optimizer step.

    trace: a level of ``trace.Tracer`` ("observe", "watch"), or None. guard: whether the scaler is replaced. out: a
    folder for ``diagnosis.json``. Further settings are those of ``guard.GradScaler`` that torch's lacks. Raises
    ArgumentError for arguments that do not fit; importing the module without lightning raises MissingExtraError.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the guarded scaler into the precision plugin."""
        if not self._guard:
            return
        plugin = trainer.precision_plugin
        why_not = ""
        if getattr(plugin, "scaler", None) is None:
            why_not = f'precision is {trainer.precision!r}, and only "16-mixed" has a scaler'
        elif trainer.world_size > 1:
            why_not = f"the run has {trainer.world_size} processes"
        elif not pl_module.automatic_optimization:
            why_not = "optimization is manual"
        scaler = self._guarded(getattr(plugin, "scaler", None), pl_module, why_not, GradScaler)
        if scaler is not None:
            plugin.scaler = scaler

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the trace, after the sanity check."""
        self._begin(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step, unless gradients are being accumulated."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._next_step()
        if self.scaler is not None:
            self.scaler.begin()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the trace."""
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the trace; the diagnosis is of what came before."""
        self.close(exception)
