"""The native way of a guarded step: the general way's numbers and promises, in one call."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from guard_native_cases import (
    LOSSES,
    OPTIMIZERS,
    assert_errs_no_more_than_stock,
    batch,
    everything,
    general,
    same,
    steep,
    trained,
)

from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.guard import LossScale, TrainStep
from mlpkit.nn import MLP
from mlpkit.nn import layers as nn_layers
from mlpkit.trace import Tracer


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


# The loss scale of fp16 is one at which these gradients do not overflow.
LOW = {"bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16", "init_scale": 1024.0}}


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", nn_layers.ACTIVATIONS)
def test_an_update_in_16_bits_errs_no_more_than_autocast(activation, loss, precision, cpu_capability):
    assert_errs_no_more_than_stock(steep(loss, activation=activation, **LOW[precision]), loss)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("rows", "hidden"), [(1, (3,)), (31, ()), (600, (300, 1)), (97, (16, 64, 40, 33))])
def test_an_update_in_16_bits_of_every_shape_errs_no_more_than_autocast(rows, hidden, precision, cpu_capability):
    assert_errs_no_more_than_stock(steep("mse", hidden=hidden, **LOW[precision]), "mse", rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
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


@pytest.mark.parametrize("drawn", [0, 1, 620, 621, 623])
def test_a_seed_is_drawn_as_torch_randint_draws(drawn):
    step, states = trained("sgd"), []
    for draw in (
        lambda: step(*batch("cross_entropy", 0)),
        lambda: torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64),
    ):
        torch.manual_seed(3)
        torch.randint(7, (drawn,))  # of the generator's 624 words
        draw()
        states.append(torch.get_rng_state())
    assert step.path == "native"
    assert torch.equal(*states)


def test_batches_of_other_sizes_change_no_bit():
    step = trained("adam")
    for rows in (33, 33, 64, 7, 33):
        twin = copy.deepcopy(step)  # which has laid out nothing
        for each in (step, twin):
            torch.manual_seed(rows)
            each(*batch("cross_entropy", rows, rows=rows))
            assert each.path == "native"
        assert same(everything(step), everything(twin))


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


@pytest.mark.parametrize("fault", ["Inf in the batch", "NaN in the batch"])
def test_a_bad_batch_in_fp16_changes_nothing_and_leaves_the_scale(fault):
    step = trained("adam", clip_norm=0.5, **LOW["fp16"])
    twin = copy.deepcopy(step)
    x, target, culprit = FAULTS[fault](*batch("cross_entropy", 0))
    before = everything(step)
    torch.manual_seed(5)
    result = step(x, target)
    assert (result.skipped, result.culprit, step.scale) == (True, culprit, 1024.0)
    assert same(before, everything(step))
    torch.manual_seed(5)
    torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    assert_steps_alike(step, twin)


def test_scaled_gradients_beyond_float16_skip_the_step_and_back_off():
    step = trained("adam", **LOW["fp16"])
    twin = copy.deepcopy(step)
    step._loss_scale.value = 2.0**24
    before, overflows = everything(step), 0
    torch.manual_seed(5)
    while step(*batch("cross_entropy", 0)).skipped:
        assert step.path == "general"
        assert same(before, everything(step))
        overflows += 1
    assert overflows > 3
    assert step.path == "native"
    assert step.scale == 2.0 ** (24 - overflows)
    twin._loss_scale.value = step.scale
    torch.manual_seed(5)
    torch.randint(-(2**63), 2**63 - 1, (2 * overflows,), dtype=torch.int64)
    twin(*batch("cross_entropy", 0))
    assert same(everything(step), everything(twin))
    assert_steps_alike(step, twin)


def assert_steps_alike(step, twin):
    """Two more native steps of each, from the same random numbers, end in the same finite bits."""
    for seed in (1, 2):
        state = torch.get_rng_state()
        for each in (step, twin):
            torch.set_rng_state(state)
            each(*batch("cross_entropy", seed))
            assert each.path == "native", each.path_reason
    assert same(everything(step), everything(twin))
    assert all(torch.isfinite(tensor).all() for tensor in everything(step))


def test_native_steps_of_fp16_move_the_scale_and_report_without_it():
    step = trained("sgd", precision="fp16", init_scale=LossScale(256.0, growth_interval=3))
    twin = general(step)
    results = []
    for each in (step, twin):
        torch.manual_seed(0)
        results.append(each(*batch("cross_entropy", 0)))
    assert (step.path, twin.path) == ("native", "general")
    assert results[0].scale == results[1].scale == 512.0
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-2)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-2)
    for seed in (1, 2):
        step(*batch("cross_entropy", seed))
    assert step.scale == 1024.0
    assert [change.reason for change in step.scale_changes] == ["growth", "growth"]


def test_gradients_that_float16_flushes_to_zero_raise_the_scale():
    step = trained("sgd", "mse", precision="fp16", init_scale=1.0)
    last = step.model.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(1e-6)
    result = step(batch("mse", 0)[0], torch.zeros(33, 5))
    assert step.path == "native"
    assert result.grad_norm == 0
    assert [change.reason for change in step.scale_changes] == ["underflow"]


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


def test_a_scheduler_moves_on_native_steps():
    torch.manual_seed(0)
    model = MLP(7, (8,), 5)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = TrainStep(model, "cross_entropy", optimizer, scheduler=scheduler)
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
