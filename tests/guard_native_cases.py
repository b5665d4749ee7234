"""Steps that go the native way, their general twins, and the comparison of both with float64; shared by the tests."""

from __future__ import annotations

import copy

import torch
from closeness import SEEDS, assert_no_worse_than
from torch import nn

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.8, 0.95)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, alpha=0.9, weight_decay=0.01),
}
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
LOSSES = {
    "cross_entropy": lambda: "cross_entropy",
    "bce": lambda: "bce",
    "mse": lambda: "mse",
    "l1": lambda: "l1",
    "huber": lambda: "huber",
    "log_mse": lambda: "log_mse",
    "smoothed cross_entropy": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted cross_entropy": lambda: nn.CrossEntropyLoss(WEIGHTS.clone(), ignore_index=2, label_smoothing=0.2),
    "summed cross_entropy": lambda: nn.CrossEntropyLoss(WEIGHTS.clone(), reduction="sum"),
    "summed mse": lambda: nn.MSELoss(reduction="sum"),
    "wide huber": lambda: nn.HuberLoss(delta=0.3),
}


def batch(loss, seed, outputs=5, dtype=torch.float32, rows=33):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 7, generator=generator)
    target = torch.randn(rows, outputs, generator=generator)
    if loss.endswith("cross_entropy"):
        return x.to(dtype), target.argmax(1)
    target = target.sigmoid() if loss == "bce" else target.exp() if loss == "log_mse" else target
    return x.to(dtype), target.to(dtype)


def trained(optimizer, loss="cross_entropy", steps=3, **options):
    """A step whose optimizer has its state; its next step can be a native one."""
    torch.manual_seed(1)
    network = {name: options.pop(name) for name in ("activation", "norm") if name in options}
    model = MLP(7, options.pop("hidden", (20, 9)), 5, **{"activation": "gelu", "dropout": 0.2} | network)
    if loss == "log_mse":  # wants positive outputs
        model.layers[-1].bias.data += 5
    step = TrainStep(model, LOSSES[loss](), OPTIMIZERS[optimizer](model.parameters()), **options)
    for index in range(steps):
        step(*batch(loss, 100 + index))
    return step


def general(step):
    """The same step in a state of its own, kept from the native way by a hook that does nothing."""
    model = copy.deepcopy(step.model)
    model.register_forward_hook(lambda *_: None)
    kind = type(step.optimizer)
    twin = kind(model.parameters(), lr=0.1)
    twin.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    result = TrainStep(model, step._native.loss, twin, clip_norm=step.clip_norm, precision=step.precision)
    result.load_state_dict(step.state_dict())
    return result


def in_double(step):
    twin = general(step)
    twin.model.double()
    loss = step._native.loss
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).double()
    for entries in twin.optimizer.state.values():
        for key, value in entries.items():
            entries[key] = value.double() if isinstance(value, torch.Tensor) and key != "step" else value
    return TrainStep(twin.model, loss, twin.optimizer, clip_norm=step.clip_norm)


def everything(step):
    """Parameters and state, copied."""
    tensors = [p.detach().clone() for p in (*step.model.parameters(), *step.model.buffers())]
    for entries in step.optimizer.state.values():
        tensors += [value.clone() for value in entries.values() if isinstance(value, torch.Tensor)]
    return tensors


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def steep(loss="cross_entropy", **options):
    """A step so long that what comes out is the gradient: its errors are not lost in the parameters' rounding."""
    step = trained("sgd", loss, steps=0, **options)
    step.optimizer.param_groups[0].update(lr=1000.0, weight_decay=0.0)
    return step


def assert_errs_no_more_than_stock(start, loss, rows=33):
    changes = {"native": [], "stock": [], "exact": []}
    for seed in SEEDS:
        steps = {"native": copy.deepcopy(start), "stock": general(start), "exact": in_double(start)}
        for name, step in steps.items():
            torch.manual_seed(seed)
            step(*batch(loss, seed, dtype=torch.float64 if name == "exact" else torch.float32, rows=rows))
            after = torch.cat([p.detach().double().flatten() for p in step.model.parameters()])
            changes[name].append(after if name == "exact" else after.float())
        assert steps["native"].path == "native", steps["native"].path_reason
        assert steps["stock"].path == "general"
    assert_no_worse_than(changes["native"], changes["stock"], changes["exact"], "updated parameters")
