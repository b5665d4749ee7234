"""The fault matrix: after a bad batch, gradient, buffer or update the run goes on like a twin that never had it."""

import copy
from contextlib import ExitStack, nullcontext

import pytest
import torch
from guard_runs import (
    OPTIMIZERS,
    PRECISIONS,
    Run,
    all_finite,
    assert_same_bits,
    gradient_of,
    inf_in_one_element,
    poison,
    set_generators,
)
from torch import nn

from mlpkit.guard import LossScale, TrainStep

# name: (what happens to the inputs, what happens to the first weight's gradient, options, who is to blame)
FAULTS = {
    "inf_batch": (poison(torch.inf), None, {}, "inputs"),
    "nan_batch": (poison(torch.nan), None, {}, "inputs"),
    "inf_gradient": (None, inf_in_one_element, {"clip_norm": 1.0}, "0.weight"),
    "batch_norm": (lambda x: x * 1e30, None, {}, "1.running_var"),
    "scale_too_high": (None, None, {"precision": "fp16"}, "0.weight"),
    "fp16_forward": (lambda x: x * 3e5, None, {"precision": "fp16"}, "forward of 0"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("clean_steps", [0, 2])
@pytest.mark.parametrize("reads_are_free", [True, False])
def test_after_a_fault_the_run_equals_its_twin_bit_for_bit(fault, optimizer, clean_steps, reads_are_free, device):
    # Not free is the way of a device: decided by one read, the update made before it where nothing vouches for it.
    if reads_are_free and device.type != "cpu":
        pytest.skip("no read of a device is free")
    spoil, change, options, culprit = FAULTS[fault]
    scale = LossScale(65536.0, ceiling=2.0**100)
    run = Run(optimizer, device, init_scale=scale, **options)
    run.step._reads_are_free = reads_are_free
    run.take(clean_steps)
    before = run.state()[:3]
    x, y = run.batch()
    if fault == "scale_too_high":
        scale.value = 2.0**100
    with gradient_of(run.model[0].weight, change) if change else nullcontext():
        result = run.step(spoil(x) if spoil else x, y)
    scale.value = 65536.0
    assert (result.skipped, result.culprit) == (True, culprit)
    assert_same_bits(run.state()[:3], before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    drawn = run.state()[3]

    twin = Run(optimizer, device, **options)
    twin.step._reads_are_free = reads_are_free
    twin.take(clean_steps)
    twin.batch()
    set_generators(drawn, device)  # all that the twin has of the bad step: its random numbers
    twin.take(3)
    set_generators(drawn, device)
    run.take(3)
    assert_same_bits(run.state(), twin.state())
    assert all_finite(run.state()[:2])


class Breaks(nn.Module):
    """Makes NaN from finite inputs."""

    def forward(self, x):
        return torch.log(x - x) * 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("culprit", ["inputs", "forward of 5"])
def test_a_skip_consumes_the_random_numbers_of_the_bad_step_and_no_others(precision, culprit):
    run = Run(precision=precision)
    if culprit != "inputs":
        run.model.append(Breaks())
    x, y = run.batch()
    stand_in = copy.deepcopy(run.model)
    before = torch.get_rng_state()
    stand_in(x)
    drawn_by_one_forward = torch.get_rng_state()
    torch.set_rng_state(before)
    assert run.step(poison(torch.nan)(x) if culprit == "inputs" else x, y).culprit == culprit
    assert torch.equal(torch.get_rng_state(), drawn_by_one_forward)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("reads_are_free", [True, False])
def test_finite_gradients_of_1e20_are_clipped_to_the_norm(optimizer, reads_are_free, device):
    run = Run(optimizer, device, clip_norm=2.0)
    run.step._reads_are_free = reads_are_free
    with ExitStack() as hooks:
        for parameter in run.model.parameters():
            hooks.enter_context(gradient_of(parameter, lambda gradient: torch.full_like(gradient, 1e20)))
        result = run.step(*run.batch())
    elements = sum(parameter.numel() for parameter in run.model.parameters())
    assert not result.skipped
    assert result.grad_norm == pytest.approx(1e20 * elements**0.5)
    total = sum(float(parameter.grad.double().square().sum()) for parameter in run.model.parameters())
    assert total**0.5 == pytest.approx(2.0)
    run.take(2)
    assert all_finite(run.state()[:2])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
def test_an_update_that_overflows_the_state_is_taken_back(optimizer, device):
    # Finite gradients, and without clipping their squares are not: the second moment would be Inf for ever.
    run = Run(optimizer, device)
    run.take(1)
    before = run.state()[:3]
    with gradient_of(run.model[4].weight, lambda gradient: torch.full_like(gradient, 1e22)):
        result = run.step(*run.batch())
    assert result.record.where == "update"
    assert result.culprit.endswith(" of 4.weight")
    assert_same_bits(run.state()[:3], before)
    run.take(2)


def test_a_parameter_that_overflows_in_the_update_is_named(device):
    run = Run("sgd", device)
    run.take(1)
    before = run.state()[:3]
    with gradient_of(run.model[0].weight, lambda gradient: torch.full_like(gradient, 3e38)):
        run.optimizer.param_groups[0]["lr"] = 10.0
        result = run.step(*run.batch())
        run.optimizer.param_groups[0]["lr"] = before[1]["param_groups"][0]["lr"]
    assert (result.culprit, result.record.where, result.record.kind) == ("0.weight", "update", "Inf")
    assert_same_bits(run.state()[:3], before)


def test_large_but_finite_parameters_are_no_false_alarm(device):
    run = Run("sgd", device)
    with torch.no_grad():
        run.model[4].bias.fill_(1e25)
    run.take(3)
    assert run.step.records == []


def test_double_precision_gradients_beyond_the_square_root_of_the_range_are_clipped():
    model = nn.Linear(2, 1).double()
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=1.0)
    with gradient_of(model.weight, lambda gradient: torch.full_like(gradient, 1e200)):
        result = step(torch.ones(4, 2).double(), torch.zeros(4, 1).double())
    assert not result.skipped
    assert result.grad_norm == pytest.approx(1e200 * 2**0.5)
    assert float(model.weight.grad.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_bad_micro_batch_discards_the_whole_accumulated_step(bad):
    run = Run("adam", accumulate=3)
    run.take(3)
    before = run.state()[:3]
    results = []
    for index in range(3):
        x, y = run.batch()
        results.append(run.step(poison(torch.inf)(x) if index == bad else x, y))
    assert all(result.skipped and result.culprit == "inputs" for result in results)
    assert results[0].record.micro_batch == bad
    assert_same_bits(run.state()[:3], before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run.take(3)
    assert (run.step.steps, run.step.skipped) == (3, 1)


def test_accumulated_micro_batches_make_the_step_of_their_mean():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2)
    first, second = step(x[:4], y[:4]), step(x[4:], y[4:])
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for half in (slice(0, 4), slice(4, 8)):
        (nn.functional.mse_loss(plain(x[half]), y[half]) * 0.5).backward()
    optimizer.step()
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert first.done
    assert first.grad_norm == second.grad_norm
