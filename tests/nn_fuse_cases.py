"""What the tests of fuse share: activations, a module with a forward of its own, and the comparison of twins."""

import torch
from torch import nn
from torch.nn import functional as F

from mlpkit.nn import FusedLinear, fuse, fuse_report

MODULES = {
    "relu": nn.ReLU(),
    "relu inplace": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}
CALLS = {
    "F.relu": (lambda z: F.relu(z), "relu"),
    "F.relu in place": (lambda z: F.relu(z, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    ".relu()": (lambda z: z.relu(), "relu"),
    ".relu_()": (lambda z: z.relu_(), "relu"),
    "clamp": (lambda z: z.clamp(min=0), "relu"),
    "torch.clamp": (lambda z: torch.clamp(z, 0.0), "relu"),
    "clamp_min": (lambda z: z.clamp_min(0), "relu"),
    "F.gelu": (lambda z: F.gelu(z), "gelu"),
    "F.gelu tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "F.silu": (lambda z: F.silu(z), "silu"),
    "torch.sigmoid": (torch.sigmoid, "sigmoid"),
    ".sigmoid()": (lambda z: z.sigmoid(), "sigmoid"),
    "F.tanh": (torch.tanh, "tanh"),
    ".tanh()": (lambda z: z.tanh(), "tanh"),
    "F.leaky_relu": (lambda z: F.leaky_relu(z, 0.3), "leaky_relu"),
}


def rows(count=12, features=7, dtype=torch.float64):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(5), dtype=dtype)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def reasons(model):
    return {entry.name: entry.what for entry in fuse_report(model).entries if entry.status == "left"}


def assert_equal_twin(model, x=None, count=None):
    """Fuse and compare: state, parameters, eval outputs, gradients. Returns the fused model."""
    x = rows() if x is None else x
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(fused.state_dict()) == list(state)
    assert all(torch.equal(fused.state_dict()[name], value) for name, value in state.items())
    ours, theirs = dict(fused.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    modes = [module.training for module in model.modules()]
    results = []
    for twin in (model, fused):
        twin.eval()
        y = twin(x.clone())
        y.square().sum().backward()
        results.append((y.detach(), [parameter.grad for parameter in model.parameters()]))
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*results)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    if count is not None:
        assert len(layers_of(fused)) == count
    return fused


class Attributes(nn.Module):
    """A module with a forward of its own: linear, activation and functional dropout."""

    def __init__(self, call=F.relu, p=0.5):
        super().__init__()
        self.fc1, self.fc2, self.call, self.p = nn.Linear(7, 9), nn.Linear(9, 3), call, p

    def forward(self, x):
        return self.fc2(F.dropout(self.call(self.fc1(x)), self.p, self.training))
