"""The training step that cannot be ruined: taken whole, or skipped whole with the culprit named.

Layer: on stock PyTorch and the census operator; tells its steps to ``mlpkit._events``, imports nothing that listens.
"""

from mlpkit.guard import optim
from mlpkit.guard.grad_scaler import GradScaler
from mlpkit.guard.history import History
from mlpkit.guard.losses import LOSSES, LossSpec, describe
from mlpkit.guard.record import SkipRecord, StepResult
from mlpkit.guard.scale import LossScale, ScaleChange
from mlpkit.guard.snapshot import Snapshot
from mlpkit.guard.step import TrainStep
from mlpkit.guard.update import DeviceScale

__all__ = [
    "LOSSES",
    "DeviceScale",
    "GradScaler",
    "History",
    "LossScale",
    "LossSpec",
    "ScaleChange",
    "SkipRecord",
    "Snapshot",
    "StepResult",
    "TrainStep",
    "describe",
    "optim",
]
