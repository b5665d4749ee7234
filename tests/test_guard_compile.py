"""torch.compile of the model inside a guarded step: the same steps, the same skips, the same names."""

import copy

import pytest
import torch
from guard_runs import assert_same_bits
from torch import nn

from mlpkit.guard import GradScaler, TrainStep

BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))

# Importing inductor uses what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(count):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_guarded_as_the_eager_one(backend):
    model = network()
    step = TrainStep(torch.compile(model, backend=backend), "cross_entropy", torch.optim.Adam(model.parameters()))
    for index, (x, y) in enumerate(batches(5)):
        before = copy.deepcopy([model.state_dict(), step.optimizer.state_dict()])
        result = step(x * torch.inf if index == 2 else x * 1e19 if index == 3 else x, y)
        assert result.skipped == (index in (2, 3))
        if result.skipped:
            assert_same_bits([model.state_dict(), step.optimizer.state_dict()], before)
    assert [record.culprit for record in step.records] == ["inputs", "1.running_var"]
    assert step.headroom.keys() == dict(model.named_parameters()).keys()


def test_compiled_steps_equal_eager_ones_bit_for_bit():
    states = []
    for compiled in (False, True):
        model = network()
        wrapped = torch.compile(model, backend="aot_eager") if compiled else model
        step = TrainStep(wrapped, "cross_entropy", torch.optim.AdamW(model.parameters()), clip_norm=0.1)
        for x, y in batches(4):
            assert not step(x, y).skipped
        states.append([model.state_dict(), step.optimizer.state_dict()])
    assert_same_bits(*states)


def test_the_forward_of_a_compiled_model_is_named_by_module():
    model = network()
    model.append(nn.Sequential(nn.Identity(), Breaks()))
    step = TrainStep(
        torch.compile(model, backend="aot_eager"), "cross_entropy", torch.optim.SGD(model.parameters(), 0.1)
    )
    ((x, y),) = batches(1)
    assert step(x, y).culprit == "forward of 4.1"


class Breaks(nn.Module):
    def forward(self, x):
        return torch.log(x - x) * 0


def test_the_scaler_guards_a_compiled_model():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters())
    scaler = GradScaler("cpu", model=compiled)
    for index, (x, y) in enumerate(batches(3)):
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(compiled(x * 1e30 if index == 1 else x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        if index == 1:
            assert_same_bits([model.state_dict(), optimizer.state_dict()], before)
    assert [record.culprit for record in scaler.records] == ["1.running_var"]
