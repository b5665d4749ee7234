"""What mlpkit.nn.fuse leaves, and why: each reason in the report, the model unchanged."""

import random

import pytest
import torch
from nn_fuse_cases import assert_equal_twin, reasons, rows
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from mlpkit.errors import ArgumentError
from mlpkit.nn import FusedLinear, fuse, fuse_report


def hooked(part):
    part.register_forward_hook(lambda *_: None)
    return part


class Subclass(nn.Linear):
    pass


class Ternary(nn.Linear):
    def forward(self, x):
        return super().forward(x).sign()


def replaced(part):
    part.forward = lambda x: x
    return part


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (lambda: (hooked(nn.Linear(7, 7)), nn.ReLU()), "Linear has a hook"),
        (lambda: (nn.Linear(7, 7), hooked(nn.ReLU())), "ReLU has a hook"),
        (lambda: (parametrizations.weight_norm(nn.Linear(7, 7)), nn.ReLU()), "parametrised|subclass"),
        (lambda: (weight_norm(nn.Linear(7, 7)), nn.ReLU()), "weight is computed"),
        (lambda: (Subclass(7, 7), nn.ReLU()), "Subclass is a subclass of nn.Linear"),
        (lambda: (Ternary(7, 7), nn.ReLU()), "Ternary is a subclass of nn.Linear"),
        (lambda: (replaced(nn.Linear(7, 7)), nn.ReLU()), "forward was replaced"),
        (lambda: (nn.Linear(7, 7), nn.PReLU(7)), "PReLU with a slope per channel"),
        (lambda: (nn.Linear(7, 7), nn.BatchNorm1d(7), nn.ReLU()), "no activation or dropout follows"),
        (lambda: (nn.Linear(7, 7), hooked(nn.Identity()), nn.ReLU()), "no activation or dropout follows"),
        (lambda: (nn.Linear(7, 7, dtype=torch.complex64), nn.Tanh()), "no torch.complex64"),
        (lambda: (nn.Linear(7, 7, device="meta"), nn.Tanh()), "no kernel for meta"),
        (lambda: (hooked(nn.Sequential(nn.Linear(7, 7))), nn.ReLU()), "no activation or dropout follows"),
    ],
)
def test_a_sequential_keeps_what_cannot_be_fused(parts, reason):
    model = nn.Sequential(*parts())
    assert fuse(model) is model
    (why,) = reasons(model).values()
    assert any(one in why for one in reason.split("|")), why


def test_shared_linears_stay():
    shared = nn.Linear(7, 7)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU())
    assert fuse(model) is model
    assert reasons(model)["0"] == "it is shared: registered at 2 places"
    block = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
    assert reasons(nn.Sequential(block, block))["0.0"] == "it is shared: registered at 2 places"
    prelu = nn.PReLU()
    assert reasons(nn.Sequential(nn.Linear(7, 7), prelu, nn.Linear(7, 7), prelu))["0"] == "its PReLU is shared"


class Traced(nn.Module):
    """Two linears and a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)
        self.act, self.seq, self.count, self.log = nn.ReLU(), nn.Sequential(nn.Linear(7, 7), nn.ReLU()), 0, []
        self.register_buffer("steps", torch.zeros(()))


def traced(forward):
    return type("Net", (Traced,), {"forward": forward})(forward)


def branching(self, x):
    return torch.relu(self.a(x)) if x.sum() > 0 else self.b(x)


def counting(self, x):
    self.count += 1
    return torch.relu(self.a(x))


def logging(self, x):
    self.log.append(1)
    return torch.relu(self.a(x))


def buffering(self, x):
    self.steps += 1
    return torch.relu(self.a(x))


def drawing(self, x):
    return torch.relu(self.a(x)) if random.random() < 2 else x


def noisy(self, x):
    return torch.relu(self.a(x) + torch.randn(7))


def modal(self, x):
    return torch.relu(self.a(x)) if self.training else self.a(x)


def reused(self, x):
    z = self.a(x)
    return torch.relu(z) + z


def twice(self, x):
    return torch.relu(self.a(torch.relu(self.a(x))))


def opened(self, x):
    z = self.seq[0](x)
    return self.seq[1](z) + z


def outside(self, x):
    return torch.relu(self.a(x)) + self.act(x)


def typed(self, x):
    return torch.relu(self.a(x)) if isinstance(x, torch.Tensor) else self.a(x)


def asking(self, x):
    return torch.relu(self.a(x)) if torch.is_tensor(x) else self.a(x)


@pytest.mark.parametrize(
    ("forward", "name", "reason"),
    [
        (typed, "a", "asks for the type of a value"),
        (asking, "a", "asks for the type of a value"),
        (lambda self, x: torch.relu(self.a(input=x)), "a", "called with other arguments than one tensor"),
        (branching, "a", "torch.fx cannot trace it"),
        (counting, "a", "changes self.count"),
        (logging, "a", "changes a list of its own"),
        (buffering, "a", "changes a dict of its own"),
        (drawing, "a", "draws random numbers"),
        (noisy, "a", "makes tensors of its own"),
        (modal, "a", "other things in training"),
        (reused, "a", "its result is used at several places"),
        (twice, "a", "it is called at 2 places"),
        (opened, "seq.0", "its result is used at several places"),
        (outside, "seq.0", "does not call it"),
        (lambda self, x, mask=None: torch.relu(self.a(x)), "a", "optional arguments"),
        (lambda self, x, *rest: torch.relu(self.a(x)), "a", "optional arguments"),
        (lambda self, x: self.a(x).clamp(min=0, max=6), "a", "clamp with bounds"),
        (lambda self, x: self.a(x).clamp(min=0.1), "a", "clamp with bounds"),
        (lambda self, x: F.dropout(self.a(x), 0.5), "a", "does not follow self.training"),
        (lambda self, x: F.dropout(self.a(x), 0.5, False), "a", "does not follow self.training"),
        (lambda self, x: F.prelu(self.a(x), self.b.bias[:1]), "a", "belongs to no nn.PReLU"),
        (lambda self, x: torch.sub(1, self.a(x)), "a", "no activation or dropout follows"),
    ],
)
def test_a_traced_module_keeps_what_cannot_be_fused(forward, name, reason):
    model = traced(forward)
    modes, state = [module.training for module in model.modules()], (random.getstate(), torch.get_rng_state())
    assert reason in reasons(model)[name]
    fused = fuse(model)
    assert not isinstance(fused.get_submodule(name), FusedLinear)
    assert [module.training for module in model.modules()] == modes
    assert (model.count, model.log, model.steps.item()) == (0, [], 0)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    torch.manual_seed(1)
    expected = model.eval()(rows(dtype=torch.float32))
    torch.manual_seed(1)
    torch.testing.assert_close(fused.eval()(rows(dtype=torch.float32)), expected)


class Untraced(nn.Module):
    """Cannot be traced; calls one Sequential as a whole and opens another."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
        self.parts = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
        self.a = nn.Linear(7, 7)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        z = self.parts[0](self.whole(x))
        return torch.relu(self.a(self.parts[1](z) + z))


def test_what_an_untraceable_module_only_calls_is_fused_and_the_rest_is_left():
    fused = assert_equal_twin(Untraced().double(), count=1)
    assert isinstance(fused.whole[0], FusedLinear)
    assert set(reasons(Untraced())) == {"parts.0", "a"}


def test_modules_kept_outside_of_the_tree_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
            self.order = [self.net]

        def forward(self, x):
            return self.order[0](x)

    model = Net()
    assert fuse(model) is model
    assert "in self.order" in reasons(model)["net.0"]


def test_pytorchs_own_layers_stay():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert fuse(model) is model
    assert "inside TransformerEncoderLayer" in reasons(model)["0.linear1"]


def test_the_report_prints_as_a_table():
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Dropout(0.25), FusedLinear(9, 9), nn.Linear(9, 3))
    assert str(fuse_report(model)).splitlines() == [
        "layer  status   what or why",
        "0      fusible  relu, dropout 0.25",
        "3      fused    relu",
        "4      left     no activation or dropout follows",
    ]
    assert [entry.status for entry in fuse_report(fuse(model)).entries] == ["fused", "fused", "left"]


def test_only_modules_are_fused():
    for function in (fuse, fuse_report):
        with pytest.raises(ArgumentError, match=f"{function.__name__}: model is str; it must be an nn.Module"):
            function("model")
