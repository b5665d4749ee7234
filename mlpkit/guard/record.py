"""What a guarded step hands back: its result, and a record of every skip."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_WHERE = {
    "inputs": "the inputs hold",
    "target": "the target holds",
    "forward": "the {culprit} gave",
    "loss": "the loss is",
    "gradient": "the gradient of {culprit} holds",
    "norm": "the {culprit} is",
    "buffer": "the forward left buffer {culprit} with",
    "update": "the update would leave {culprit} with",
}


@dataclass(frozen=True)
class SkipRecord:
    """One skipped step: who made Inf or NaN, how many, and what was saved.

    step: 0-based index among all steps, skipped ones too. culprit: a parameter's or buffer's qualified name,
    ``"loss"``, ``"forward of <module>"``, ``"inputs"`` or ``"target"``. where: ``inputs | target | forward | loss |
    gradient | norm | buffer | update``. kind: ``"NaN"`` if there is one, else ``"Inf"``; count: of both; shape: of the
    culprit's tensor. tensors: how many tensors of that place were bad. scale: the step's loss scale. micro_batch: index
    in the window. parameters: how many were saved.
    """

    step: int
    culprit: str
    where: str
    kind: str
    count: int
    nans: int
    infs: int
    shape: tuple[int, ...]
    tensors: int
    scale: float
    loss: float
    micro_batch: int
    parameters: int
    note: str = ""

    def __str__(self) -> str:
        counts = [f"{count} {kind}" for count, kind in ((self.nans, "NaN"), (self.infs, "Inf")) if count]
        held = self.kind if self.where in ("loss", "norm") else " and ".join(counts)
        size = f" (shape {self.shape})" if self.shape else ""
        scale = f" The loss scale was {self.scale:g}." if self.scale != 1 else ""
        note = f" {self.note}" if self.note else ""
        where = _WHERE[self.where].format(culprit=self.culprit)
        saved = f"Step skipped; {self.parameters} parameters were saved."
        return f"Step {self.step}: {where} {held}{size}.{scale}{note} {saved}"


class Window:
    """The fate that the micro-batches of one step share; ``record`` is set when the step was skipped."""

    def __init__(self, done: bool = False, norm: Tensor | float | None = None) -> None:
        self.done = done
        self.norm = norm
        self.record: SkipRecord | None = None


class StepResult:
    """What one call of a ``TrainStep`` did. ``loss`` and ``grad_norm`` stay on the device until they are read.

    With ``accumulate=N`` the N results of a step share its fate: until the last call ``done`` and ``skipped`` are False
    and ``grad_norm`` and ``culprit`` None.
    """

    def __init__(self, loss: Tensor | float, scale: float, window: Window) -> None:
        self._loss: Tensor | float = loss
        self._window = window
        self.scale = scale

    @property
    def loss(self) -> float:
        """The loss of this (micro-)batch, unscaled. Syncs."""
        self._loss = float(self._loss)
        return self._loss

    @property
    def done(self) -> bool:
        """Whether the step that this batch belongs to has been taken or skipped."""
        return self._window.done

    @property
    def skipped(self) -> bool:
        """Whether the step was skipped."""
        return self._window.record is not None

    @property
    def grad_norm(self) -> float | None:
        """The global norm of the gradients, unscaled, before clipping; Inf or NaN after a bad batch. Syncs."""
        if self._window.norm is not None:
            self._window.norm = float(self._window.norm)
        return self._window.norm

    @property
    def culprit(self) -> str | None:
        """Who made Inf or NaN; None when the step was taken."""
        return self._window.record.culprit if self._window.record else None

    @property
    def record(self) -> SkipRecord | None:
        """Everything known about the skip; None when the step was taken."""
        return self._window.record

    def __repr__(self) -> str:
        norm = "None" if self.grad_norm is None else f"{self.grad_norm:.4g}"
        culprit = f", culprit={self.culprit!r}" if self.skipped else ""
        return (
            f"StepResult(loss={self.loss:.4g}, grad_norm={norm}, scale={self.scale:g}, skipped={self.skipped}{culprit})"
        )
