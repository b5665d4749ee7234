"""The fault matrix: after a bad batch, gradient, buffer or update the run goes on like a twin that never had it."""

import copy
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch import nn

from mlpkit.errors import NonFiniteError
from mlpkit.guard import LossScale, TrainStep

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


def set_generators(states, device):
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_skip_consumes_the_random_numbers_of_the_bad_step_and_no_others(precision):
    run = Run(precision=precision)
    x, y = run.batch()
    stand_in = copy.deepcopy(run.model)
    before = torch.get_rng_state()
    stand_in(x)
    drawn_by_one_forward = torch.get_rng_state()
    torch.set_rng_state(before)
    assert run.step(poison(torch.nan)(x), y).skipped
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


def test_an_error_inside_the_forward_leaves_nothing_behind():
    class Breaks(nn.Module):
        broken = False

        def forward(self, x):
            if self.broken:
                raise KeyError("user code")
            return x

    run = Run("adam")
    breaks = Breaks()
    run.model.append(breaks)
    run.take(1)
    before = run.state()[:3]
    breaks.broken = True
    with pytest.raises(KeyError, match="user code"):
        run.step(*run.batch())
    assert_same_bits(run.state()[:3], before)
    breaks.broken = False
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
