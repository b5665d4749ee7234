"""The kernels of a small network's step, run thread by thread on the CPU, with tensors in and out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import torch
from emulator import DTYPES, Device, build, pointer
from torch import Tensor

from mlpkit.reference import ACTIVATIONS

LOSSES = ("cross_entropy", "bce", "mse", "l1", "huber", "log_mse")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
OUTCOME = ("loss", "norm", "scale", "taken", "overflowed")
PLAN = ("blocks", "floats", "deep", "high", "teams", "resident", "shared_sums", "shared_bytes", "row_blocks", "panels")


class _Network(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_int),
        ("widths", ctypes.c_void_p),
        ("p", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("activation", ctypes.c_int),
    ]


@dataclass
class Task:
    """A network, its batch and its loss. target: classes, or float32 of the outputs' shape."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    x: Tensor
    target: Tensor | None = None
    activation: str = "relu"
    p: float = 0.0
    loss: str = "cross_entropy"
    mean: bool = True
    label_smoothing: float = 0.0
    ignore_index: int = -100
    class_weights: Tensor | None = None
    delta: float = 1.0
    seed: Tensor = field(default_factory=lambda: torch.tensor([-0x123456789ABCDEF, 7]))
    loss_scale: Tensor | None = None

    @property
    def widths(self) -> list[int]:
        return [self.weights[0].shape[1], *(weight.shape[0] for weight in self.weights)]

    @property
    def by_counted(self) -> bool:
        return self.mean and self.loss == "cross_entropy"

    def keeps_slopes(self) -> bool:
        return not (self.activation == "relu" or (self.activation == "identity" and self.p == 0))

    def parameters(self) -> list[Tensor]:
        return [one for pair in zip(self.weights, self.biases) for one in pair if one is not None]


class MlpStep(Device):
    def __init__(self, compiler: str, folder: Path) -> None:
        super().__init__(build(compiler, folder, kernels=("mlp_step.cu", "mlp_update.cu"), calls=["mlp_step.cpp"]))
        self.multiprocessors, self.shared_bytes = 2, 227 * 1024

    def plan(self, task: Task, gradients: bool = True, loss: bool = True) -> dict[str, int] | None:
        widths = (ctypes.c_int * len(task.widths))(*task.widths)
        numbers = (ctypes.c_int64 * len(PLAN))()
        code = self._library.emulate_mlp_plan(
            len(task.weights),
            widths,
            ctypes.c_int64(task.x.shape[0]),
            *(int(gradients), int(task.keeps_slopes()), int(loss), self.multiprocessors, self.shared_bytes),
            numbers,
        )
        return None if code else dict(zip(PLAN, numbers))

    def run_pass(
        self, task: Task, dtype: torch.dtype, *, gradients: bool = True, loss: bool = True, outputs: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, parts, values)``, each written into memory full of 0xff."""
        plan = self.plan(task, gradients, loss)
        assert plan is not None
        rows, last = task.x.shape[0], task.widths[-1]
        y = _poisoned((rows, last), dtype) if outputs else None
        parts = _poisoned((plan["blocks"], plan["floats"]), torch.float32) if gradients else None
        values = _poisoned((plan["blocks"], 3), torch.float64)
        classes = task.target if loss and task.loss == "cross_entropy" else None
        target = task.target if loss and classes is None else None
        scale = 1.0 if not task.mean else 1.0 / (rows * (1 if classes is not None else last))
        draws = task.p > 0
        network, keep = _network(task)
        read = [task.x, *task.weights, *task.biases, task.seed, classes, target, task.class_weights, task.loss_scale]
        self.become(self.multiprocessors, self.shared_bytes)
        self.run(
            "emulate_mlp_pass",
            read,
            [y, parts, values],
            *(ctypes.byref(network), DTYPES.index(dtype), ctypes.c_int64(rows), pointer(task.x)),
            *(int(task.x.dtype == torch.float32), pointer(task.seed if draws else None), pointer(y)),
            *(LOSSES.index(task.loss) if loss else -1, int(task.mean), ctypes.c_double(scale)),
            *(ctypes.c_double(task.delta), ctypes.c_double(task.label_smoothing), pointer(classes), pointer(target)),
            *(ctypes.c_int64(task.ignore_index), pointer(task.class_weights), pointer(task.loss_scale)),
            *(int(task.keeps_slopes()), self.multiprocessors, self.shared_bytes, pointer(parts), pointer(values)),
        )
        del keep
        return y, parts, values

    def update(
        self,
        task: Task,
        parts: Tensor,
        values: Tensor,
        states: list[tuple[Tensor | None, Tensor | None, Tensor | None]],
        optimizer: str,
        group: list[float],
        clip_norm: float = 0.0,
        clean_steps: Tensor | None = None,
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Updates parameters and state in place; the gradients, and loss, norm, scale, taken and overflowed.

        group: lr, weight decay, momentum, dampening, beta1, beta2, eps, nesterov.
        """
        rows, blocks = task.x.shape[0], (parts.shape[1] + 127) // 128
        sizes = [(one.numel() + 3) // 4 * 4 for one in task.parameters()]
        gradients = _poisoned((sum(sizes),), torch.float32)
        squares, bad = _poisoned((blocks,), torch.float64), _poisoned((blocks,), torch.int32)
        control = _poisoned((len(OUTCOME) * 8 + 4 * 18,), torch.uint8)
        flat = [one for state in states for one in state]
        addresses = (ctypes.c_void_p * len(flat))(*(pointer(one).value for one in flat))
        network, keep = _network(task)
        written = [*task.parameters(), *flat, task.seed, gradients, squares, bad, control, task.loss_scale, clean_steps]
        self.run(
            "emulate_mlp_update",
            [parts, values],
            written,
            *(ctypes.byref(network), ctypes.c_int64(rows), parts.shape[0], ctypes.c_int64(parts.shape[1])),
            *(int(task.mean), int(task.by_counted), pointer(parts), pointer(values), addresses),
            *(OPTIMIZERS.index(optimizer), (ctypes.c_double * 8)(*group), ctypes.c_double(clip_norm)),
            *(pointer(gradients), pointer(squares), pointer(bad), pointer(control), pointer(task.seed)),
            *(pointer(task.loss_scale), pointer(clean_steps)),
        )
        del keep
        found = dict(zip(OUTCOME, control[: len(OUTCOME) * 8].view(torch.float64).tolist()))
        split = [piece[: one.numel()].view_as(one) for piece, one in zip(gradients.split(sizes), task.parameters())]
        return split, found


def _network(task: Task) -> tuple[_Network, list[object]]:
    count = len(task.weights)
    widths = (ctypes.c_int * (count + 1))(*task.widths)
    p = (ctypes.c_double * count)(*([task.p] * count))
    weights, biases = (
        (ctypes.c_void_p * count)(*(pointer(one).value for one in each)) for each in (task.weights, task.biases)
    )
    fields = [ctypes.cast(each, ctypes.c_void_p) for each in (widths, p, weights, biases)]
    return _Network(count, *fields, ACTIVATIONS.index(task.activation)), [widths, p, weights, biases]


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    return torch.full((size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)
