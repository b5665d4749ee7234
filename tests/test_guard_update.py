"""guard's native update and the tensors it is given: swapped, laid out anew, loaded from elsewhere."""

import copy

import pytest
import torch
from torch import nn

from mlpkit.guard import TrainStep, optim
from mlpkit.nn import MLP

OURS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {}, "RMSprop": {"centered": True, "momentum": 0.5}}
TORCH = {"torch": torch.optim.Adam, "torch, fused": lambda p: torch.optim.Adam(p, fused=True), "ours": optim.Adam}


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, 5, generator=generator), torch.randn(2, 2, generator=generator)


def states(optimizer):
    return [value for entries in optimizer.state.values() for value in entries.values()]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("turned", [0, 2], ids=["new", "with state"])
def test_another_memory_format_changes_no_number(name, turned):
    ours, twin = convolution(), convolution()
    optimizers = [getattr(optim, name)(model.parameters(), **OURS[name]) for model in (ours, twin)]
    for step in range(5):
        if step == turned:
            ours.to(memory_format=torch.channels_last)
        for index, (a, b) in enumerate(zip(ours.parameters(), twin.parameters(), strict=True)):
            b.grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(10 * step + index))
            # In turns as the parameter lies, and as it does not.
            a.grad = torch.empty_like(a).copy_(b.grad) if step % 2 else b.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert ours[0].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*map(states, optimizers), strict=True):
        assert torch.equal(a, b)


def test_loaded_state_that_lies_otherwise_is_paired_by_place():
    ours, twin = convolution().to(memory_format=torch.channels_last), convolution()
    mine, other = optim.Adam(ours.parameters()), optim.Adam(twin.parameters())
    for step in range(3):
        if step == 2:
            mine.load_state_dict(copy.deepcopy(other.state_dict()))
            ours.load_state_dict(twin.state_dict())
        for index, (a, b) in enumerate(zip(ours.parameters(), twin.parameters(), strict=True)):
            a.grad = b.grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(10 * step + index))
        if step == 2:
            mine.step()
        other.step()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", TORCH)
def test_a_guarded_step_pairs_by_place_whatever_the_memory_format(which):
    ours, twin = convolution(), convolution()
    steps = [TrainStep(model, "mse", TORCH[which](model.parameters())) for model in (ours, twin)]
    for step in range(4):
        if step == 2:
            ours.to(memory_format=torch.channels_last)
        for each in steps:
            each(*images(step))
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        # The convolution may sum in another order.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", TORCH)
def test_a_parameter_may_be_swapped_after_a_step(which):
    model = nn.Linear(3, 2)
    step = TrainStep(model, "mse", TORCH[which](model.parameters()))
    batch = torch.ones(4, 3), torch.zeros(4, 2)
    step(*batch)
    other = nn.Parameter(torch.full((2, 3), 5.0))
    torch.utils.swap_tensors(model.weight, other)
    assert not step(*batch).skipped
    assert torch.all(model.weight < 5)  # the one that is the model's now
    assert torch.all(other < 1)


def test_a_conversion_may_swap_parameters_after_a_step():
    model = nn.Linear(3, 2)
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1))
    step(torch.ones(4, 3), torch.zeros(4, 2))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = model.weight.detach().clone()
    step(torch.ones(4, 3).double(), torch.zeros(4, 2).double())
    assert not torch.equal(before, model.weight)


def test_swapped_state_is_the_state():
    parameter, twin = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    ours, other = optim.Adam([parameter]), optim.Adam([twin])
    for step in range(3):
        if step == 2:
            value = torch.full((3,), 5.0)
            torch.utils.swap_tensors(ours.state[parameter]["exp_avg"], value)
            other.state[twin]["exp_avg"].fill_(5.0)
        for p, optimizer in ((parameter, ours), (twin, other)):
            p.grad = torch.ones(3)
            optimizer.step()
    assert torch.equal(parameter, twin)
    assert torch.equal(ours.state[parameter]["exp_avg"], other.state[twin]["exp_avg"])


@pytest.mark.parametrize("which", TORCH)
def test_a_copied_step_goes_on_alone(which):
    model = nn.Sequential(nn.Linear(3, 2))
    step = TrainStep(model, "mse", TORCH[which](model.parameters()))
    batch = torch.ones(4, 3), torch.zeros(4, 2)
    step(*batch)
    other = copy.deepcopy(step)
    before = [p.detach().clone() for p in model.parameters()]
    other(*batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(*batch)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), model.parameters(), strict=True))


LARGE = torch.tensor([[3e38, 1e38, -2e38, 1e30]])


@pytest.mark.parametrize("clip", [1.0, 1e-3, 1e-9])
def test_a_factor_below_float32s_numbers_loses_nothing(clip):
    parameter = nn.Parameter(torch.zeros(1, 4))
    optimizer = optim.SGD([parameter], lr=1.0, clip_norm=clip)
    parameter.grad = LARGE.clone()
    optimizer.step()
    wanted = -clip * LARGE.double() / LARGE.double().norm()
    torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("hooked", [False, True])
def test_nor_does_it_in_a_guarded_step(make, hooked):
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = make(model.parameters(), lr=1.0)
    if hooked:
        optimizer.register_step_pre_hook(lambda *_: None)
    step = TrainStep(model, lambda output, target: (output * target).sum(), optimizer, clip_norm=1e-9)
    assert not step(LARGE, torch.ones(1, 1)).skipped
    wanted = 1e-9 * LARGE.double() / LARGE.double().norm()
    if make is torch.optim.Adagrad:
        wanted = wanted / (wanted.abs() + optimizer.defaults["eps"])
    # The last one's square is below float32's numbers.
    torch.testing.assert_close(-model.weight.detach().double()[:, :3], wanted[:, :3], rtol=1e-5, atol=0)


def test_a_native_step_leaves_such_a_factor_to_the_general_way():
    model = MLP(4, [], 1, bias=False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    step = TrainStep(model, "l1", torch.optim.SGD(model.parameters(), lr=1.0), clip_norm=1e-9)
    step(LARGE, torch.full((1, 1), -1.0))
    (weight,) = model.parameters()
    torch.testing.assert_close(
        -weight.detach().double(), 1e-9 * LARGE.double() / LARGE.double().norm(), rtol=1e-6, atol=0
    )
