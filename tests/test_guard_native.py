"""The native way of a guarded step: the general way's numbers and promises, in one call."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from closeness import SEEDS, assert_no_worse_than
from torch import nn

from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.guard import TrainStep
from mlpkit.nn import MLP
from mlpkit.nn import layers as nn_layers
from mlpkit.trace import Tracer

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.8, 0.95)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, alpha=0.9, weight_decay=0.01),
}
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
LOSSES = {
    "cross_entropy": lambda: "cross_entropy",
    "bce": lambda: "bce",
    "mse": lambda: "mse",
    "l1": lambda: "l1",
    "huber": lambda: "huber",
    "log_mse": lambda: "log_mse",
    "smoothed cross_entropy": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted cross_entropy": lambda: nn.CrossEntropyLoss(WEIGHTS.clone(), ignore_index=2, label_smoothing=0.2),
    "summed cross_entropy": lambda: nn.CrossEntropyLoss(WEIGHTS.clone(), reduction="sum"),
    "summed mse": lambda: nn.MSELoss(reduction="sum"),
    "wide huber": lambda: nn.HuberLoss(delta=0.3),
}


def batch(loss, seed, outputs=5, dtype=torch.float32, rows=33):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 7, generator=generator)
    target = torch.randn(rows, outputs, generator=generator)
    if loss.endswith("cross_entropy"):
        return x.to(dtype), target.argmax(1)
    target = target.sigmoid() if loss == "bce" else target.exp() if loss == "log_mse" else target
    return x.to(dtype), target.to(dtype)


def trained(optimizer, loss="cross_entropy", steps=3, **options):
    """A step whose optimizer has its state; its next step can be a native one."""
    torch.manual_seed(1)
    model = MLP(7, options.pop("hidden", (20, 9)), 5, activation=options.pop("activation", "gelu"), dropout=0.2)
    if loss == "log_mse":  # wants positive outputs
        model.layers[-1].bias.data += 5
    step = TrainStep(model, LOSSES[loss](), OPTIMIZERS[optimizer](model.parameters()), **options)
    for index in range(steps):
        step(*batch(loss, 100 + index))
    return step


def general(step):
    """The same step in a state of its own, kept from the native way by a hook that does nothing."""
    model = copy.deepcopy(step.model)
    model.register_forward_hook(lambda *_: None)
    kind = type(step.optimizer)
    twin = kind(model.parameters(), lr=0.1)
    twin.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    result = TrainStep(model, step._native.loss, twin, clip_norm=step.clip_norm, precision=step.precision)
    result.load_state_dict(step.state_dict())
    return result


def in_double(step):
    twin = general(step)
    twin.model.double()
    loss = step._native.loss
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).double()
    for entries in twin.optimizer.state.values():
        for key, value in entries.items():
            entries[key] = value.double() if isinstance(value, torch.Tensor) and key != "step" else value
    return TrainStep(twin.model, loss, twin.optimizer, clip_norm=step.clip_norm)


def everything(step):
    """Parameters and state, copied."""
    tensors = [p.detach().clone() for p in step.model.parameters()]
    for entries in step.optimizer.state.values():
        tensors += [value.clone() for value in entries.values() if isinstance(value, torch.Tensor)]
    return tensors


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def steep(loss="cross_entropy", **options):
    """A step so long that what comes out is the gradient: its errors are not lost in the parameters' rounding."""
    step = trained("sgd", loss, steps=0, **options)
    step.optimizer.param_groups[0].update(lr=1000.0, weight_decay=0.0)
    return step


def assert_errs_no_more_than_stock(start, loss, rows=33):
    changes = {"native": [], "stock": [], "exact": []}
    for seed in SEEDS:
        steps = {"native": copy.deepcopy(start), "stock": general(start), "exact": in_double(start)}
        for name, step in steps.items():
            torch.manual_seed(seed)
            step(*batch(loss, seed, dtype=torch.float64 if name == "exact" else torch.float32, rows=rows))
            after = torch.cat([p.detach().double().flatten() for p in step.model.parameters()])
            changes[name].append(after if name == "exact" else after.float())
        assert steps["native"].path == "native", steps["native"].path_reason
        assert steps["stock"].path == "general"
    assert_no_worse_than(changes["native"], changes["stock"], changes["exact"], "updated parameters")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_errs_no_more_than_stock(optimizer, cpu_capability):
    assert_errs_no_more_than_stock(trained(optimizer, clip_norm=0.5), "cross_entropy")


@pytest.mark.parametrize("loss", LOSSES)
def test_an_update_by_every_loss_errs_no_more_than_stock(loss, cpu_capability):
    assert_errs_no_more_than_stock(steep(loss), loss)


@pytest.mark.parametrize("activation", nn_layers.ACTIVATIONS)
def test_an_update_through_every_activation_errs_no_more_than_stock(activation, cpu_capability):
    assert_errs_no_more_than_stock(steep(activation=activation), "cross_entropy")


@pytest.mark.parametrize(("rows", "hidden"), [(1, (3,)), (31, ()), (600, (300, 1)), (97, (16, 64, 40, 33))])
def test_an_update_of_every_shape_errs_no_more_than_stock(rows, hidden, cpu_capability):
    assert_errs_no_more_than_stock(steep("mse", hidden=hidden), "mse", rows)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", nn_layers.ACTIVATIONS)
def test_an_update_in_bf16_errs_no_more_than_autocast(activation, loss, cpu_capability):
    assert_errs_no_more_than_stock(steep(loss, activation=activation, precision="bf16"), loss)


@pytest.mark.parametrize(("rows", "hidden"), [(1, (3,)), (31, ()), (600, (300, 1)), (97, (16, 64, 40, 33))])
def test_an_update_in_bf16_of_every_shape_errs_no_more_than_autocast(rows, hidden, cpu_capability):
    assert_errs_no_more_than_stock(steep("mse", hidden=hidden, precision="bf16"), "mse", rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [64, 700])
def test_threads_change_no_bit(rows, precision):
    start, threads, results = trained("adam", hidden=(260, 130), precision=precision), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step = copy.deepcopy(start)
            torch.manual_seed(0)
            result = step(*batch("cross_entropy", 0, rows=rows))
            assert step.path == "native"
            results.append((everything(step), result.loss, result.grad_norm))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert same(results[0][0], other[0])
        assert results[0][1:] == other[1:]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_result_state_and_random_numbers_are_those_of_the_general_way(optimizer):
    native = trained(optimizer, clip_norm=0.5)
    twin = general(native)
    for seed in range(3):
        results, states = [], []
        for step in (native, twin):
            torch.manual_seed(seed)
            results.append(step(*batch("cross_entropy", seed)))
            states.append(torch.get_rng_state())
        assert (native.path, twin.path) == ("native", "general")
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
        assert not results[0].skipped
        assert results[0].done
        assert torch.equal(*states)
    counts = [[e["step"] for e in s.optimizer.state.values() if "step" in e] for s in (native, twin)]
    assert counts[0] == counts[1]
    assert native.steps == twin.steps


FAULTS = {
    "Inf in the batch": lambda x, t: (x.index_fill(0, torch.tensor([3]), math.inf), t, "inputs"),
    "NaN in the batch": lambda x, t: (x.index_fill(0, torch.tensor([3]), math.nan), t, "inputs"),
    "overflow in the forward": lambda x, t: (x.sign() * 3e38, t, "forward of layers.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_batch_changes_nothing_and_is_named(optimizer, fault):
    step = trained(optimizer)
    twin = copy.deepcopy(step)
    x, target, culprit = FAULTS[fault](*batch("cross_entropy", 0))
    before = everything(step)
    torch.manual_seed(5)
    result = step(x, target)
    assert result.skipped
    assert result.culprit == culprit
    assert step.path == "general"
    assert same(before, everything(step))
    torch.manual_seed(5)
    torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)  # the masks of the bad batch stay drawn
    for other in (step, twin):
        state = torch.get_rng_state()
        other(*batch("cross_entropy", 1))
        assert other.path == "native"
        torch.set_rng_state(state)
    assert same(everything(step), everything(twin))


def test_state_that_was_bad_before_is_an_error_and_never_a_skip():
    step = trained("adam")
    with torch.no_grad():
        step.optimizer.state[step.model.layers[0].weight]["exp_avg_sq"][2, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"exp_avg_sq of layers\.0\.weight"):
        step(*batch("cross_entropy", 0))


def test_gradients_of_1e20_are_clipped_and_taken():
    step = trained("sgd", "mse", clip_norm=1.0)
    x, target = batch("mse", 0)
    before = everything(step)
    result = step(x, target * 1e17)
    assert not result.skipped
    assert result.grad_norm > 1e15
    change = torch.cat([(a - b).flatten() for a, b in zip(everything(step), before, strict=True)])
    assert 0 < change.norm() < 0.2


def test_a_class_out_of_range_is_the_general_ways_error():
    step = trained("adam")
    before = everything(step)
    with pytest.raises(IndexError):
        step(batch("cross_entropy", 0)[0], torch.full((33,), 9))
    assert same(before, everything(step))


def test_a_learning_rate_that_is_nan_is_refused_before_anything_changes():
    step = trained("adam")
    step.optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ArgumentError, match="lr"):
        step(*batch("cross_entropy", 0))


def test_a_changed_learning_rate_and_loaded_state_are_used():
    step = trained("adam")
    twin = general(step)
    for each in (step, twin):
        each.optimizer.param_groups[0]["lr"] = 0.05
        each.optimizer.load_state_dict(copy.deepcopy(each.optimizer.state_dict()))
        torch.manual_seed(0)
        each(*batch("cross_entropy", 0))
    assert step.path == "native"
    for a, b in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_update_is_an_in_place_change_that_autograd_knows_of():
    step = trained("sgd")
    weight = step.model.layers[0].weight
    loss = (weight * weight).sum()
    step(*batch("cross_entropy", 0))
    assert step.path == "native"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_settings_of_a_loss_module_are_read_at_each_step():
    step = trained("sgd", "weighted cross_entropy")
    changes = [
        lambda loss: setattr(loss, "label_smoothing", 0.5),
        lambda loss: loss.weight.mul_(3.0),
        lambda loss: setattr(loss, "weight", torch.ones(5)),
        lambda loss: setattr(loss, "reduction", "sum"),
        lambda loss: setattr(loss, "ignore_index", 0),
    ]
    for index, change in enumerate(changes):
        change(step._native.loss)
        twin = general(step)
        results = []
        for each in (step, twin):
            torch.manual_seed(index)
            results.append(each(*batch("cross_entropy", index)))
        assert step.path == "native"
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)


def test_a_scheduler_moves_on_native_steps():
    torch.manual_seed(0)
    model = MLP(7, (8,), 5)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = TrainStep(model, "cross_entropy", optimizer, scheduler=scheduler)
    optimizer.step()  # what a scheduler wants to see first
    for index in range(3):
        step(*batch("cross_entropy", index))
    assert step.path == "native"
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_network_in_evaluation_drops_nothing():
    step = trained("sgd")
    step.model.eval()
    twin = general(step)
    twin.model.eval()
    state = torch.get_rng_state()
    for each in (step, twin):
        each(*batch("cross_entropy", 0))
    assert step.path == "native"
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_tracing_changes_no_bit():
    def run(traced):
        step = trained("adam")
        torch.manual_seed(9)
        with Tracer(step.model) if traced else nullcontext():
            for index in range(4):
                x, target = batch("cross_entropy", index)
                step(x.sign() * 3e38 if index == 2 else x, target)
        return everything(step), torch.get_rng_state(), step

    (plain, state, step), (traced, traced_state, _) = run(False), run(True)
    assert same(plain, traced)
    assert torch.equal(state, traced_state)
    assert step.skipped == 1


def test_a_tracer_still_explains_the_bad_step():
    step = trained("adam")
    with Tracer(step.model) as tracer:
        for index in range(4):
            tracer.next_step()
            x, target = batch("cross_entropy", index)
            step(x.sign() * 3e38 if index == 2 else x, target)
    diagnosis = tracer.diagnosis
    assert (diagnosis.verdict, diagnosis.step, diagnosis.phase) == ("failure", 2, "forward")
    assert diagnosis.module == "layers.0"
    assert "Step skipped" in diagnosis.sentence


def with_hook(step):
    step.model.layers[0].register_forward_hook(lambda *_: None)


def with_gradient_hook(step):
    step.model.layers[0].weight.register_hook(lambda grad: grad)


def frozen(step):
    step.model.layers[0].weight.requires_grad_(False)


def with_maximize(step):
    step.optimizer.param_groups[0]["maximize"] = True


def with_optimizer_hook(step):
    step.optimizer.register_step_post_hook(lambda *_: None)


def with_another_memory(step):
    weight = step.model.layers[0].weight
    weight.data = weight.data.t().contiguous().t()


def with_a_forward_of_its_own(step):
    original = step.model.layers[0].forward
    step.model.layers[0].forward = lambda x, **options: original(x, **options)


REASONS = {
    with_another_memory: "not contiguous",
    with_a_forward_of_its_own: "replaced",
    with_hook: "hook",
    with_gradient_hook: "gradient hook",
    frozen: "frozen",
    with_maximize: "settings",
    with_optimizer_hook: "hooks or settings",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_the_native_way_does_not_know_goes_the_general_way(change):
    step = trained("adam")
    change(step)
    step(*batch("cross_entropy", 0))
    assert step.path == "general"
    assert REASONS[change] in step.path_reason


def test_a_weight_that_two_layers_share_is_updated_once():
    torch.manual_seed(0)
    model = MLP(7, (7, 7), 5)
    model.layers[1].weight = model.layers[0].weight
    step = TrainStep(model, "cross_entropy", torch.optim.Adam(model.parameters(), 1e-2))
    for index in range(3):
        step(*batch("cross_entropy", index))
    assert step.path == "general"
    assert "share" in step.path_reason
    assert {int(entries["step"]) for entries in step.optimizer.state.values()} == {3}


def test_parts_that_are_never_native_say_why():
    stock = nn.Sequential(nn.Linear(7, 5))
    normed, plain = MLP(7, (8,), 5, norm="batch"), MLP(7, (8,), 5)
    weighted = nn.CrossEntropyLoss(weight=torch.ones(5, dtype=torch.float64))
    rows = [
        (stock, "cross_entropy", torch.optim.SGD, {}, "not an nn.MLP"),
        (normed, "cross_entropy", torch.optim.SGD, {}, "without a norm"),
        (plain, lambda z, t: nn.functional.cross_entropy(z, t), torch.optim.SGD, {}, "loss"),
        (plain.double(), weighted, torch.optim.SGD, {}, "float32"),
        (MLP(7, (8,), 5), "cross_entropy", torch.optim.Adagrad, {}, "Adagrad"),
        (MLP(7, (8,), 5), "cross_entropy", torch.optim.SGD, {"precision": "fp16"}, "precision"),
        (MLP(7, (8,), 5), "cross_entropy", torch.optim.SGD, {"accumulate": 2}, "accumulated"),
    ]
    for model, loss, optimizer, options, reason in rows:
        step = TrainStep(model, loss, optimizer(model.parameters(), 0.1), **options)
        x, target = batch("cross_entropy", 0)
        step(x.to(model.layers[0].weight.dtype) if isinstance(model, MLP) else x, target)
        assert step.path == "general"
        assert reason in step.path_reason
