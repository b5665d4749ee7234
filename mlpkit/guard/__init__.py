"""The training step that cannot be ruined: taken whole, or skipped whole with the culprit named.

Layer: on stock PyTorch alone; tells its steps to ``mlpkit._events``, imports nothing that listens.
"""

from mlpkit.guard.losses import LOSSES, LossSpec, describe
from mlpkit.guard.record import SkipRecord, StepResult
from mlpkit.guard.scale import LossScale, ScaleChange
from mlpkit.guard.step import TrainStep

__all__ = ["LOSSES", "LossScale", "LossSpec", "ScaleChange", "SkipRecord", "StepResult", "TrainStep", "describe"]
