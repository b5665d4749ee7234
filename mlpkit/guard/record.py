"""What a guarded step hands back: its result, and a record of every skip."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from mlpkit.guard.census import Finding

_WHERE = {
    "inputs": "the inputs hold",
    "target": "the target holds",
    "forward": "the {culprit} gave",
    "loss": "the loss is",
    "gradient": "the gradient of {culprit} holds",
    "norm": "the {culprit} is",
    "buffer": "the forward left buffer {culprit} with",
    "update": "the update would leave {culprit} with",
    "state": "before the step, {culprit} held",
}


_SKIPPED = "Step skipped"
_DONE = {"fp32 step": "Step taken in float32 instead"}


@dataclass(frozen=True)
class SkipRecord:
    """One skipped step: who made Inf or NaN, how many, and what was saved.

    step: 0-based index among all steps, skipped ones too. culprit: a parameter's or buffer's qualified name,
    ``"loss"``, ``"forward of <module>"``, ``"inputs"`` or ``"target"``. where: ``inputs | target | forward | loss |
    gradient | norm | buffer | update | state``. kind: ``"NaN"`` if there is one, else ``"Inf"``; count: of both;
    shape: of the culprit's tensor. tensors: how many tensors of that place were bad. scale: the step's loss scale.
    micro_batch: index in the window. parameters: how many were saved. first_index: flat index of the first bad
    element. nature: ``calibration | collapse | data | gradient | update | state``, see ``guard.headroom.nature``.
    absmax: the culprit gradient's largest magnitudes in the last steps, scaled, this step's at the end; empty for
    other culprits. rank: where it began, under DDP or FSDP2. module, op, cause: of the first operation that went
    wrong, where a tracer runs. action: what was done beside skipping (``"fp32 step"``: taken after all, in float32;
    ``"rollback to step 40"``), else empty.
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
    first_index: int | None = None
    nature: str = ""
    absmax: tuple[float, ...] = ()
    rank: int | None = None
    module: str | None = None
    op: str | None = None
    cause: str | None = None
    action: str = ""

    @classmethod
    def of(
        cls,
        finding: Finding,
        *,
        step: int,
        where: str,
        parameters: int,
        scale: float = 1.0,
        loss: float = math.nan,
        micro_batch: int = 0,
        culprit: str | None = None,
        **known: Any,
    ) -> SkipRecord:
        """The record of what was found; culprit: where it is more than the tensor's name. known: further fields."""
        return cls(
            step=step,
            culprit=finding.name if culprit is None else culprit,
            where=where,
            kind=finding.kind,
            count=finding.count,
            nans=finding.nans,
            infs=finding.infs,
            shape=finding.shape,
            tensors=finding.tensors,
            scale=scale,
            loss=loss,
            micro_batch=micro_batch,
            parameters=parameters,
            first_index=finding.first_index,
            **known,
        )

    @property
    def taken(self) -> bool:
        """Whether the step was taken after all: in float32."""
        return self.action in _DONE

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON takes them: Inf and NaN are strings, tuples lists."""
        return {key: plain(value) for key, value in asdict(self).items()}

    def __str__(self) -> str:
        counts = [f"{count} {kind}" for count, kind in ((self.nans, "NaN"), (self.infs, "Inf")) if count]
        held = self.kind if self.where in ("loss", "norm") else " and ".join(counts)
        size = f" (shape {self.shape})" if self.shape and not self.culprit.endswith(str(self.shape)) else ""
        scale = f" The loss scale was {self.scale:g}." if self.scale != 1 else ""
        note = f" {self.note}" if self.note else ""
        where = _WHERE[self.where].format(culprit=self.culprit)
        saved = f"{_DONE.get(self.action, _SKIPPED)}; {self.parameters} parameters were saved."
        saved += f" {self.action.capitalize()}." if self.action and self.action not in _DONE else ""
        place = f"Step {self.step}" if self.rank is None else f"Step {self.step}, rank {self.rank}"
        op = f" It began in {self.op}{f' of {self.module}' if self.module else ''}." if self.op else ""
        return f"{place}: {where} {held}{size}.{op}{scale}{note} {saved}"


def plain(value: Any) -> Any:
    """A value as JSON takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    return [plain(one) for one in value] if isinstance(value, tuple) else value


class Window:
    """The fate that the micro-batches of one step share; ``record`` is set when the step was skipped."""

    def __init__(self, done: bool = False, norm: Tensor | float | None = None) -> None:
        self.done = done
        self.norm = norm
        self.record: SkipRecord | None = None


class StepResult:
    """What one call of a ``TrainStep`` did. ``loss``, ``grad_norm`` and ``scale`` stay on the device until read.

    Made by ``TrainStep``; its fields are plain floats (of scalar tensors), bools and texts, and reading them raises
    nothing.

    With ``accumulate=N`` the N results of a step share its fate: until the last call ``done`` and ``skipped`` are False
    and ``grad_norm`` and ``culprit`` None.
    """

    def __init__(self, loss: Tensor | float, scale: Tensor | float, window: Window) -> None:
        self._loss: Tensor | float = loss
        self._window = window
        self._scale: Tensor | float = scale

    @property
    def scale(self) -> float:
        """The loss scale of this step. Syncs where a device moves it."""
        self._scale = float(self._scale)
        return self._scale

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
        return self._window.record is not None and not self._window.record.taken

    @property
    def grad_norm(self) -> float | None:
        """The global norm of the gradients, unscaled, before clipping; Inf or NaN after a bad batch. Syncs."""
        if self._window.norm is not None:
            self._window.norm = float(self._window.norm)
        return self._window.norm

    @property
    def culprit(self) -> str | None:
        """Who made Inf or NaN; None when the step was taken at once."""
        return self._window.record.culprit if self._window.record else None

    @property
    def record(self) -> SkipRecord | None:
        """Everything known about the skip; None when the step was taken at once."""
        return self._window.record

    def __repr__(self) -> str:
        norm = "None" if self.grad_norm is None else f"{self.grad_norm:.4g}"
        culprit = f", culprit={self.culprit!r}" if self.skipped else ""
        return (
            f"StepResult(loss={self.loss:.4g}, grad_norm={norm}, scale={self.scale:g}, skipped={self.skipped}{culprit})"
        )
