"""A training loop with a scaler, as it stands in a thousand scripts: for the tests of guard.GradScaler."""

import copy

import torch
from guard_runs import OPTIMIZERS
from torch import nn

from mlpkit.guard import GradScaler

STOCK = torch.amp.GradScaler


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Loop:
    """A training loop as it stands in a thousand scripts; only the scaler's class differs."""

    def __init__(self, kind=GradScaler, optimizer="adamw", clip=None, autocast=True, **options):
        self.model = network()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        if kind is GradScaler:
            options.setdefault("model", self.model)
        self.scaler = kind("cpu", **options)
        self.clip, self.autocast = clip, autocast
        self.data = torch.Generator().manual_seed(7)

    def batch(self):
        return torch.randn(16, 5, generator=self.data), torch.randint(3, (16,), generator=self.data)

    def take(self, x=None, y=None, spoil=None):
        x, y = self.batch() if x is None else (x, y)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=self.autocast):
            loss = nn.functional.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        if spoil:
            spoil(self)
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def state(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])
