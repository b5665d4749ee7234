"""What the guard keeps between steps, beside copies of buffers: at most 64 bytes a tensor, Python's objects counted."""

import gc
import tracemalloc

import pytest
import torch
from torch import nn

from mlpkit.guard import GradScaler, TrainStep, optim

KINDS = [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, optim.AdamW]
CONSTANT = 24_000  # objects of the guard itself, however many tensors there are


def kept(fused, history):
    assert fused.prepared
    return fused.bytes() + sum(row.values.nbytes for row in history._rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_keeps_at_most_64_bytes_a_tensor(kind):
    count = 4000
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(count)]
    optimizer, scaler = kind(parameters, lr=1e-3), GradScaler("cpu", init_scale=8.0)
    scaler._warned = True
    for parameter in parameters:
        parameter.grad = torch.ones(2)

    def step():
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()

    step()  # makes the optimizer's state, which is not ours
    del scaler._optimizers[optimizer]
    gc.collect()
    tracemalloc.start()
    for _ in range(12):
        step()
    gc.collect()
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    one = scaler._optimizers[optimizer]
    assert kept(one.fused, one.absmax) + python <= 64 * count + CONSTANT


class Deep(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + 1e-3 * layer(x)
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_a_train_step_keeps_at_most_64_bytes_a_tensor(kind):
    count = 1600
    model = Deep(count // 2)
    optimizer = kind(model.parameters(), lr=1e-4)
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    optimizer.step()  # makes the optimizer's state, which is not ours
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y)
    gc.collect()
    tracemalloc.start()
    step = TrainStep(model, "mse", optimizer)
    for _ in range(10):
        step(x, y)
    optimizer.zero_grad()
    gc.collect()
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert step.path == "general"
    assert kept(step._decision.direct._update, step._absmax) + python <= 64 * count + CONSTANT
