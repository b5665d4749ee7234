"""guard.TrainStep on clean batches and wrong arguments: what it computes, reports, saves and refuses."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpkit import _events
from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.guard import LossScale, TrainStep
from mlpkit.nn import MLP

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused_adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
}


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


def guarded(loss="cross_entropy", model=None, **options):
    model = model or network()
    return TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clean_steps_equal_a_plain_loop_bit_for_bit(optimizer):
    model = network()
    plain = copy.deepcopy(model)
    ours, stock = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](plain.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(ours, 2, gamma=0.5)
    stock_schedule = torch.optim.lr_scheduler.StepLR(stock, 2, gamma=0.5)
    step = TrainStep(model, "cross_entropy", ours, scheduler=schedule)
    torch.manual_seed(1)
    losses = [step(*batch(seed)).loss for seed in range(5)]
    torch.manual_seed(1)
    for seed in range(5):
        x, y = batch(seed)
        stock.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        stock.step()
        stock_schedule.step()
        assert loss.item() == losses[seed]
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)


def test_an_fp16_step_is_the_autocast_step_of_the_unscaled_loss():
    model = nn.Linear(5, 3)
    plain = copy.deepcopy(model)
    x, y = batch()
    result = guarded(model=model, precision="fp16")(x, y)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(plain(x), y)
    (loss * 65536.0).backward()
    for ours, stock in zip(model.parameters(), plain.parameters(), strict=True):
        # A power of two scales exactly.
        assert torch.equal(ours.grad, stock.grad / 65536.0)
    assert result.loss == loss.item()
    assert result.scale == 65536.0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_norm_is_that_of_the_unscaled_gradients_before_clipping(precision):
    model = network()
    result = guarded(model=model, precision=precision, clip_norm=1e-3)(*batch())
    total = sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters())
    assert math.sqrt(total) == pytest.approx(1e-3)
    assert result.grad_norm > 1e-3


def test_the_norm_that_clips_is_a_sum_in_double_precision():
    model = nn.Linear(1000, 100)
    result = guarded("mse", model, clip_norm=1e6)(torch.randn(4, 1000), torch.randn(4, 100))
    exact = math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters()))
    assert result.grad_norm == pytest.approx(exact, rel=1e-12)


def test_a_norm_below_the_limit_changes_no_gradient():
    model = network().eval()
    plain = copy.deepcopy(model)
    x, y = batch()
    guarded(model=model, clip_norm=1e6)(x, y)
    F.cross_entropy(plain(x), y).backward()
    for ours, stock in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, stock.grad)


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.linear(a + b)

    step = guarded("mse", Sum())
    a, b, y = torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 1)
    assert not step((a, b), y).skipped
    assert not step({"a": a, "b": b}, y).skipped
    assert not guarded("mse", nn.Linear(2, 1))(a, y).skipped


@pytest.mark.parametrize("pack", [lambda loss: SimpleNamespace(loss=loss), lambda loss: {"loss": loss}])
def test_without_a_loss_the_output_brings_its_own(pack):
    class Owns(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x):
            return pack(self.linear(x).square().mean())

    step = guarded(None, Owns())
    assert not step(torch.ones(3, 2)).skipped
    with pytest.raises(ArgumentError, match="a target came, but loss=None"):
        step(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(ArgumentError, match=r"wants an output with \.loss, not Tensor"):
        guarded(None, nn.Linear(2, 1))(torch.ones(3, 2))


def test_a_loss_may_be_any_callable_of_output_and_target():
    model = nn.Linear(2, 1)
    result = guarded(lambda output, target: (output - target).square().sum(), model)(torch.ones(3, 2), torch.ones(3, 1))
    assert result.grad_norm > 0


def test_the_scheduler_moves_on_taken_steps_only():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = TrainStep(
        model, "cross_entropy", optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    )
    x, y = batch()
    step(x * torch.nan, y)
    assert optimizer.param_groups[0]["lr"] == 1.0
    step(x, y)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_scale_doubles_after_clean_steps_and_halves_after_an_overflow_within_its_bounds():
    model = nn.Linear(5, 3)
    scale = LossScale(4.0, growth_interval=2, floor=4.0, ceiling=16.0)
    step = guarded(model=model, precision="fp16", init_scale=scale)
    assert [step(*batch(seed)).scale for seed in range(7)] == [4.0, 4.0, 8.0, 8.0, 16.0, 16.0, 16.0]
    handle = model.weight.register_hook(lambda gradient: gradient * torch.inf)
    assert [step(*batch(seed)).scale for seed in range(4)] == [16.0, 8.0, 4.0, 4.0]
    handle.remove()
    assert [step(*batch(seed)).scale for seed in range(3)] == [4.0, 4.0, 8.0]
    changes = [(change.step, change.before, change.after, change.reason) for change in step.scale_changes]
    grown = [(1, 4.0, 8.0, "growth"), (3, 8.0, 16.0, "growth")]
    assert changes == [*grown, (7, 16.0, 8.0, "backoff"), (8, 8.0, 4.0, "backoff"), (12, 4.0, 8.0, "growth")]
    assert "at its floor" in step.records[-1].note
    assert "at its floor" not in step.records[0].note


def test_a_forward_that_overflows_does_not_lower_the_scale():
    # An Inf in the forward comes back at any scale: backing off would only starve the gradients of bits.
    step = guarded(precision="fp16")
    x, y = batch()
    result = step(x * 1e6, y)
    assert result.culprit == "forward of 0"
    assert step.scale == 65536.0


def test_fp32_and_bf16_have_no_scale():
    for precision in ("fp32", "bf16"):
        step = guarded(precision=precision)
        assert (step.scale, step(*batch()).scale, step.scale_changes) == (1.0, 1.0, [])


def test_raise_puts_everything_back_and_then_raises():
    step = guarded(on_nonfinite="raise")
    x, y = batch()
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(NonFiniteError, match=r"Step 0: the inputs hold 80 NaN \(shape \(16, 5\)\)"):
        step(x * torch.nan, y)
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)
    assert len(step.records) == 1
    assert not step(x, y).skipped


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_fused_network_learns_under_the_guard_with_a_bad_batch_in_between(precision, norm):
    model = MLP(5, (32, 16), 3, dropout=0.1, norm=norm)
    step = TrainStep(model, "cross_entropy", torch.optim.Adam(model.parameters(), lr=0.01), precision=precision)
    x, y = batch()
    results = [step(x * torch.inf if index == 20 else x, y) for index in range(40)]
    assert [index for index, result in enumerate(results) if result.skipped] == [20]
    assert results[-1].loss < 0.5 * results[0].loss
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_every_step_is_announced_once():
    events = []
    end = _events.subscribe(events.append)
    step = guarded(accumulate=2)
    x, y = batch()
    for inputs in (x, x, x, x * torch.nan):
        step(inputs, y)
    end()
    assert events == [
        {"kind": "step", "step": 0, "skipped": False, "culprit": None, "scale": 1.0, "parameters": 6},
        {"kind": "skip", "step": 1},
        {"kind": "step", "step": 1, "skipped": True, "culprit": "inputs", "scale": 1.0, "parameters": 6},
    ]


def test_a_saved_step_goes_on_where_it_was():
    step = guarded(precision="fp16", init_scale=LossScale(4.0, growth_interval=3))
    x, y = batch()
    for inputs in (x, x * torch.nan, x):
        step(inputs, y)
    other = guarded(precision="fp16", init_scale=LossScale(64.0, growth_interval=3))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert (other.scale, other.steps, other.skipped) == (4.0, 3, 1)
    other(x, y)
    assert other.scale == 8.0
    model_state = copy.deepcopy(other.model.state_dict())
    waiting = guarded(model=other.model, accumulate=2)
    waiting(x, y)
    other.model.load_state_dict(model_state)
    waiting.load_state_dict(step.state_dict())
    torch.testing.assert_close(other.model.state_dict(), model_state, rtol=0, atol=0)
    assert not waiting(x, y).done
    for wrong in ({}, {**step.state_dict(), "version": 2}, {**step.state_dict(), "scale": math.nan}):
        with pytest.raises(ArgumentError):
            other.load_state_dict(wrong)


def test_the_cpu_waits_for_no_flag():
    assert guarded().syncs == 0


@pytest.mark.cuda
def test_on_cuda_a_clean_step_reads_one_flag():
    step = guarded(model=network().cuda(), precision="fp16", clip_norm=1.0)
    x, y = (tensor.cuda() for tensor in batch())
    step(x, y)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warned:
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warned) == step.syncs == 1


def test_a_result_prints_what_happened():
    step = guarded()
    x, y = batch()
    assert repr(step(x, y)).startswith("StepResult(loss=")
    assert repr(step(x * torch.nan, y)).endswith("skipped=True, culprit='inputs')")
