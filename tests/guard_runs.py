"""A small network under a guarded step, and comparison of whole states bit by bit: for the tests of mlpkit.guard."""

import copy
from contextlib import contextmanager

import torch
from torch import nn

from mlpkit.guard import TrainStep

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
    "centred_rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, centered=True),
}
PRECISIONS = ("fp32", "fp16", "bf16")


class Run:
    """A small network under a guarded step, always the same one, with an endless stream of clean batches."""

    def __init__(self, optimizer="sgd", device="cpu", **options):
        torch.manual_seed(3)
        self.device = torch.device(device)
        layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.step = TrainStep(self.model, "cross_entropy", self.optimizer, scheduler=self.scheduler, **options)
        self.data = torch.Generator().manual_seed(7)

    def batch(self):
        x = torch.randn(16, 5, generator=self.data)
        return x.to(self.device), torch.randint(3, (16,), generator=self.data).to(self.device)

    def take(self, steps):
        results = [self.step(*self.batch()) for _ in range(steps)]
        assert not any(result.skipped for result in results)

    def state(self):
        generators = [torch.get_rng_state()]
        if self.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.device))
        parts = [self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()]
        return copy.deepcopy([*parts, generators])


def flat(tree):
    """Everything in a state as plain values, tensors by their bits: NaN equals NaN, and 0 differs from -0."""
    if isinstance(tree, torch.Tensor):
        return (tuple(tree.shape), str(tree.dtype), tree.detach().cpu().reshape(-1).view(torch.uint8).tolist())
    if isinstance(tree, dict):
        return {key: flat(value) for key, value in tree.items() if key != "_step_count"}
    if isinstance(tree, (list, tuple)):
        return [flat(value) for value in tree]
    return tree


def assert_same_bits(ours, other):
    assert flat(ours) == flat(other)


def all_finite(tree):
    if isinstance(tree, torch.Tensor):
        return bool(torch.isfinite(tree).all())
    if isinstance(tree, dict):
        return all(all_finite(value) for value in tree.values())
    return all(all_finite(value) for value in tree) if isinstance(tree, list) else True


@contextmanager
def gradient_of(parameter, change):
    handle = parameter.register_hook(change)
    yield
    handle.remove()


def poison(value):
    def change(x):
        x = x.clone()
        x[3, 2] = value
        return x

    return change


def inf_in_one_element(gradient):
    gradient = gradient.clone()
    gradient[2, 1] = torch.inf
    return gradient


def set_generators(states, device):
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


PARTS = slice(0, 3)  # of Run.state(): all but the random numbers


def bad(run, value=torch.nan):
    x, y = run.batch()
    return run.step(poison(value)(x), y)
