"""Networks with batch or layer norms, the native way: numbers, running averages and promises of the general one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from guard_native_cases import assert_errs_no_more_than_stock, batch, everything, general, same, steep, trained

from mlpkit.errors import NonFiniteError
from mlpkit.nn import layers as nn_layers

NORMS = ["batch", "layer"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("activation", nn_layers.ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_an_update_errs_no_more_than_stock(norm, activation, precision, cpu_capability):
    start = steep("mse", norm=norm, activation=activation, precision=precision, init_scale=1024.0)
    assert_errs_no_more_than_stock(start, "mse", rows=70)


@pytest.mark.parametrize(("rows", "hidden"), [(33, (3,)), (600, (300, 40)), (97, (16, 64, 40, 33))])
@pytest.mark.parametrize("norm", NORMS)
def test_an_update_of_every_shape_errs_no_more_than_stock(norm, rows, hidden, cpu_capability):
    assert_errs_no_more_than_stock(steep("mse", norm=norm, hidden=hidden), "mse", rows)


@pytest.mark.parametrize("norm", NORMS)
def test_state_and_running_averages_are_those_of_the_general_way(norm):
    native = trained("adam", norm=norm)
    twin = general(native)
    for seed in range(3):
        for step in (native, twin):
            torch.manual_seed(seed)
            step(*batch("cross_entropy", seed))
    assert (native.path, twin.path) == ("native", "general"), native.path_reason
    for a, b in zip(everything(native), everything(twin), strict=True):
        torch.testing.assert_close(a, b)
    counts = [int(buffer) for name, buffer in native.model.named_buffers() if name.endswith("batches_tracked")]
    assert counts == ([6, 6] if norm == "batch" else [])


@pytest.mark.parametrize("norm", NORMS)
def test_a_bad_batch_changes_nothing(norm):
    step = trained("adam", norm=norm)
    before = everything(step)
    x, target = batch("cross_entropy", 0)
    x[3] = math.nan
    assert step(x, target).skipped
    assert same(before, everything(step))
    step(*batch("cross_entropy", 1))
    assert step.path == "native"


def test_norms_in_evaluation_use_their_averages_and_leave_them():
    step = trained("sgd", norm="batch")
    for block in step.model.blocks:
        block[0].eval()
    twin = general(step)
    buffers = [buffer.clone() for buffer in step.model.buffers()]
    for each in (step, twin):
        torch.manual_seed(0)
        each(*batch("cross_entropy", 0))
    assert step.path == "native", step.path_reason
    assert all(torch.equal(a, b) for a, b in zip(buffers, step.model.buffers(), strict=True))
    for a, b in zip(everything(step), everything(twin), strict=True):
        torch.testing.assert_close(a, b)


def test_running_averages_that_are_not_finite_are_an_error():
    step = trained("sgd", norm="batch")
    step.model.blocks[0][0].running_var[2] = math.inf
    with pytest.raises(NonFiniteError, match="running_var"):
        step(*batch("cross_entropy", 0))


def test_a_single_row_is_the_general_ways_error():
    step = trained("sgd", norm="batch")
    with pytest.raises(ValueError, match="more than 1 value"):
        step(*batch("cross_entropy", 0, rows=1))


@pytest.mark.parametrize(("rows", "norm"), [(64, "layer"), (700, "layer"), (700, "batch")])
def test_threads_change_no_bit(rows, norm):
    start, threads, results = trained("adam", norm=norm, hidden=(260, 130)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step = copy.deepcopy(start)
            torch.manual_seed(0)
            step(*batch("cross_entropy", 0, rows=rows))
            assert step.path == "native"
            results.append(everything(step))
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], other) for other in results[1:])


def test_a_changed_norm_is_noticed():
    step = trained("sgd", norm="batch")
    step.model.blocks[0][0].momentum = 0.5
    twin = general(step)
    for each in (step, twin):
        torch.manual_seed(0)
        each(*batch("cross_entropy", 0))
    for a, b in zip(step.model.buffers(), twin.model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    step.model.blocks[1][0].register_forward_hook(lambda *_: None)
    step(*batch("cross_entropy", 1))
    assert step.path == "general"
