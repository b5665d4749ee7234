"""Optimizers beside their stock counterparts, for the tests of guarded updates."""

from dataclasses import dataclass, field

import torch

from mlpkit.guard import optim

SHAPES = [(33, 7), (64,), (1,), (5, 3, 2), (0, 4), (129,)]


@dataclass
class Case:
    """One optimizer with its settings: ours, and torch's with the arguments that name its implementation."""

    name: str
    settings: dict = field(default_factory=dict)
    stock: dict = field(default_factory=lambda: {"fused": True})
    # Whether bits are compared: torch's fused kernels take the last few elements one by one, without contraction, and
    # torch's RMSprop takes square roots that are not rounded correctly.
    exact: bool = True

    def ours(self, parameters, **more):
        return getattr(optim, self.name)(parameters, **self.settings, **more)

    def theirs(self, parameters):
        return getattr(torch.optim, self.name)(parameters, **self.settings, **self.stock)

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


PLAIN = {"stock": {"foreach": False}, "exact": False}
CASES = [
    Case("SGD", {"lr": 0.05}),
    Case("SGD", {"lr": 0.05, "weight_decay": 0.1}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "maximize": True}),
    Case("Adam", {"lr": 0.01}),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    Case("Adam", {"lr": 0.01, "maximize": True, "betas": (0.8, 0.99), "eps": 1e-6}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.01, "amsgrad": True}),
    Case("RMSprop", {"lr": 0.01}, **PLAIN),
    Case("RMSprop", {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}, **PLAIN),
    Case("RMSprop", {"lr": 0.01, "centered": True, "maximize": True}, **PLAIN),
]
OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "LARS", "LAMB"]


def parameters(dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(targets, step=0, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for target in targets:
        target.grad = (scale * torch.randn(target.shape, generator=generator)).to(target.dtype)


def everything(optimizer):
    """Copies of all parameters and state, by place."""
    found = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found[index, "p"] = parameter.detach().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[index, key] = value.clone() if isinstance(value, torch.Tensor) else value
    return found


def assert_same(before, after):
    assert before.keys() == after.keys()
    for place, value in before.items():
        same = torch.equal(value, after[place]) if isinstance(value, torch.Tensor) else value == after[place]
        assert same, f"{place} changed"


def take_over(mine, stock):
    """Give ours the parameters and state of the other."""
    pairs = zip(*([p for group in one.param_groups for p in group["params"]] for one in (mine, stock)))
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)
            for key, value in stock.state[theirs].items() if theirs in stock.state else ():
                if isinstance(value, torch.Tensor):
                    mine.state[ours][key].copy_(value)


def make(name, targets, **settings):
    if name in ("SGD", "LARS", "RMSprop"):
        settings = {"momentum": 0.9, **settings}
    return getattr(optim, name)(targets, **settings)
