"""Three ways to train one small network under the guard, and the faults that they meet: for test_guard_matrix.py."""

import copy
from functools import partial

import torch
from guard_runs import gradient_of, inf_in_one_element, poison
from torch import nn

from mlpkit import nn as fused
from mlpkit.guard import GradScaler, LossScale, TrainStep

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}
STATE = {"sgd": "momentum_buffer", "adam": "exp_avg", "adamw": "exp_avg", "rmsprop": "square_avg"}
BACKOFF = 2.0**-10  # a few overflows would take a scale without a floor below the smallest fp32 number


class Way:
    """A network, its optimizer and an endless stream of clean batches."""

    def __init__(self, optimizer, precision="fp32", clip=None):
        torch.manual_seed(3)
        self.precision, self.clip = precision, clip
        self.model = self.network()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.data = torch.Generator().manual_seed(7)
        self.prepare()

    def network(self):
        layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
        return nn.Sequential(*layers)

    def batch(self):
        return torch.randn(16, 5, generator=self.data), torch.randn(16, 3, generator=self.data)

    def clean(self, steps):
        before = self.skips()
        for _ in range(steps):
            self.take(*self.batch())
        assert self.skips() == before

    def state(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])

    def first_weight(self):
        return next(self.model.parameters())


class General(Way):
    """TrainStep of any module."""

    path = "general"

    def prepare(self):
        self.scaling = LossScale(65536.0, ceiling=2.0**26, backoff=BACKOFF)
        options = {"precision": self.precision, "clip_norm": self.clip, "init_scale": self.scaling}
        self.step = TrainStep(self.model, "mse", self.optimizer, **options)

    def take(self, x, y):
        self.step(x, y)

    def clean(self, steps):
        super().clean(steps)
        assert self.step.path == self.path

    def skips(self):
        return self.step.skipped

    def records(self):
        return self.step.records

    def scale(self, value=None):
        self.scaling.value = self.scaling.value if value is None else value
        return self.scaling.value

    def share_scale(self, other):
        self.scaling.value, self.scaling.clean_steps = other.scaling.value, other.scaling.clean_steps


class Native(General):
    """TrainStep of an MLP: one native call."""

    path = "native"

    def network(self):
        return fused.MLP(5, (8,), 3, norm="batch", dropout=0.3)


class DropIn(Way):
    """The loop of torch.amp's users, with our scaler."""

    def prepare(self):
        half = self.precision == "fp16"
        scale = 65536.0 if half else 1.0
        self.scaler = GradScaler("cpu", scale, backoff_factor=BACKOFF, model=self.model, ceiling=2.0**26)

    def take(self, x, y):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=self.precision == "fp16"):
            output = self.model(x)
        self.scaler.scale(nn.functional.mse_loss(output.float(), y)).backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def skips(self):
        return self.scaler.skipped

    def records(self):
        return self.scaler.records

    def scale(self, value=None):
        if value is not None:
            self.scaler.update(value)
        return self.scaler.get_scale()

    def share_scale(self, other):
        self.scaler.load_state_dict(other.scaler.state_dict())


WAYS = {"native": Native, "general": General, "drop_in": DropIn}

# What happens to a run in a fault; each leaves the run as a user would go on with it.


def batch_of(change, times=1):
    def happen(run):
        for _ in range(times):
            run.take(*change(*run.batch()))

    return happen


def gradients(change, times=1, every=False):
    def happen(run):
        parameters = list(run.model.parameters()) if every else [run.first_weight()]
        handles = [gradient_of(parameter, change) for parameter in parameters]
        for handle in handles:
            handle.__enter__()
        for _ in range(times):
            run.take(*run.batch())
        for handle in handles:
            handle.__exit__(None, None, None)

    return happen


def scale_too_high(run):
    run.scale(2.0**26)
    run.take(*run.batch())


def accumulated(run):
    """Every product fits float16, their sum does not."""
    x, y = run.batch()
    run.take(x.sign() * 0 + 6e4 * run.first_weight().detach()[0].sign(), y)


# name: (what happens, precision, clip)
FAULTS = {
    "inf_batch": (batch_of(lambda x, y: (poison(torch.inf)(x), y)), "fp32", None),
    "nan_batch": (batch_of(lambda x, y: (poison(torch.nan)(x), y)), "fp32", None),
    "loss_spike": (batch_of(lambda x, y: (x, y * 1e25)), "fp32", None),
    "inf_gradient": (gradients(inf_in_one_element), "fp32", None),
    "gradients_of_1e30": (gradients(lambda g: torch.full_like(g, 1e30), every=True), "fp32", None),
    "scale_too_high": (scale_too_high, "fp16", None),
    "scale_collapse": (batch_of(lambda x, y: (x * 3e5, y), times=12), "fp16", None),
    "inverse_scale": (gradients(inf_in_one_element, times=16), "fp16", None),
    "fp16_accumulation": (accumulated, "fp16", None),
    "batch_norm": (batch_of(lambda x, y: (x * 1e25, y)), "fp32", None),
}
