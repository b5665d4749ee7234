"""What a guarded step puts back, and what it refuses: bad state, buffers, optimizers with a memory of their own."""

import copy

import pytest
import torch
from guard_runs import (
    Run,
    assert_same_bits,
    gradient_of,
)
from torch import nn

from mlpkit.errors import NonFiniteError
from mlpkit.guard import TrainStep


@pytest.mark.parametrize("place", ["parameter", "optimizer state", "buffer"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_state_that_is_already_bad_is_an_error_that_names_it(place, optimizer, device):
    run = Run(optimizer, device)
    run.take(2)
    key = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    target, name = {
        "parameter": (run.model[4].bias.data, "4.bias"),
        "optimizer state": (run.optimizer.state[run.model[0].bias][key], f"{key} of 0.bias"),
        "buffer": (run.model[1].running_mean, "1.running_mean"),
    }[place]
    target[1] = torch.nan
    before = run.state()
    with pytest.raises(NonFiniteError, match=f"{place} '{name}' held 1 NaN before the step"):
        run.step(*run.batch())
    assert_same_bits(run.state()[:3], before[:3])
    assert run.step.records == []


def test_an_error_inside_the_forward_leaves_nothing_behind():
    class Fails(nn.Module):
        broken = False

        def forward(self, x):
            if self.broken:
                raise KeyError("user code")
            return x

    run = Run("adam")
    fails = Fails()
    run.model.append(fails)
    run.take(1)
    before = run.state()[:3]
    fails.broken = True
    with pytest.raises(KeyError, match="user code"):
        run.step(*run.batch())
    assert_same_bits(run.state()[:3], before)
    fails.broken = False
    run.take(1)


def test_an_optimizer_that_raises_halfway_is_put_back():
    class Breaks(torch.optim.SGD):
        broken = False

        def step(self, closure=None):
            super().step(closure)
            if self.broken:
                raise RuntimeError("user optimizer")

    model = nn.Linear(3, 1)
    optimizer = Breaks(model.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(model, "mse", optimizer)
    optimizer.broken = True
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(RuntimeError, match="user optimizer"):
        step(torch.ones(2, 3), torch.ones(2, 1))
    assert_same_bits([model.state_dict(), optimizer.state_dict()], before)


def test_a_second_moment_that_someone_made_negative_ruins_no_parameter():
    run = Run("adamw")
    run.take(2)
    run.optimizer.state[run.model[4].bias]["exp_avg_sq"][0] = -1.0
    before = run.state()[:3]
    result = run.step(*run.batch())
    assert (result.culprit, result.record.where, result.record.kind) == ("4.bias", "update", "NaN")
    assert_same_bits(run.state()[:3], before)


def test_running_statistics_are_never_meant_to_be_infinite():
    run = Run()
    run.model[1].running_var[0] = torch.inf
    step = TrainStep(run.model, "cross_entropy", run.optimizer)
    with pytest.raises(NonFiniteError, match=r"buffer '1\.running_var' held 1 Inf"):
        step(*run.batch())


def test_what_an_optimizer_keeps_elsewhere_than_in_tensors_is_put_back_too():
    class Keeps(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            group = self.param_groups[0]
            group["count"] = group.get("count", 0) + 1
            group.setdefault("total", torch.zeros(1)).add_(1)
            for parameter in group["params"]:
                self.state[parameter].setdefault("history", []).append(group["count"])

    model = nn.Linear(2, 1)
    optimizer = Keeps(model.parameters(), lr=10.0, momentum=0.9)
    step = TrainStep(model, "mse", optimizer)
    x, y = torch.ones(3, 2), torch.zeros(3, 1)
    for steps in (0, 1, 2):
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        with gradient_of(model.weight, lambda gradient: torch.full_like(gradient, 3e38)):
            assert step(x, y).record.where == "update"
        assert_same_bits([model.state_dict(), optimizer.state_dict()], before)
        assert optimizer.param_groups[0].get("count", 0) == steps
        assert not step(x, y).skipped


def test_an_intended_infinity_in_a_buffer_is_no_fault():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

        def forward(self, x):
            return torch.softmax(self.linear(x) + self.mask, -1)

    model = Masked()
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1))
    assert not step(torch.randn(4, 4), torch.zeros(4, 4)).skipped
    assert step(torch.full((4, 4), torch.nan), torch.zeros(4, 4)).culprit == "inputs"


@pytest.mark.parametrize(
    ("how", "error"),
    [("rebound", "'mean' rebound"), ("resized", "'mean' resized"), ("added", "a new buffer 'other' in ''")],
)
def test_a_buffer_that_the_forward_rebinds_resizes_or_adds_is_refused_by_name(how, error):
    class Tracks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            if how == "rebound":
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            elif how == "added":
                self.register_buffer("other", torch.zeros(1))
            else:
                self.mean.resize_(5)
            return self.linear(x)

    model = Tracks()
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=error):
        step(torch.ones(3, 2), torch.ones(3, 1))
    assert_same_bits(model.state_dict(), before)
