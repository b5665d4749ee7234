"""The fault matrix: every fault x every optimizer x every way in; afterwards the run is its twin, bit for bit."""

import copy
import math

import pytest
import torch
from guard_matrix import FAULTS, OPTIMIZERS, STATE, WAYS, gradients
from guard_runs import all_finite, assert_same_bits

from mlpkit.errors import ArgumentError, NonFiniteError

CELLS = [
    (fault, optimizer, way)
    for fault, (_, precision, _) in FAULTS.items()
    for optimizer in OPTIMIZERS
    for way in WAYS
    if precision != "fp16" or way != "native"  # the native way has no loss scale to be hurt
]


def twin_of(run, optimizer, way, batches, **options):
    """A run that did the same clean steps, saw none of the bad ones, and has their random numbers and scale alone."""
    drawn = torch.get_rng_state()
    twin = WAYS[way](optimizer, **options)
    twin.clean(3)
    for _ in range(batches):
        twin.batch()
    twin.share_scale(run)
    torch.set_rng_state(drawn)
    return twin


def assert_twins(run, twin, drawn):
    torch.set_rng_state(drawn)
    twin.clean(3)
    torch.set_rng_state(drawn)
    run.clean(3)
    assert_same_bits(run.state(), twin.state())
    assert all_finite(run.state())


@pytest.mark.parametrize(("fault", "optimizer", "way"), CELLS)
def test_after_a_fault_the_run_is_its_twin_bit_for_bit(fault, optimizer, way):
    happen, precision, clip = FAULTS[fault]
    run = WAYS[way](optimizer, precision=precision, clip=clip)
    run.clean(3)
    before = run.state()
    happen(run)
    if fault == "gradients_of_1e30" and optimizer == "sgd":
        # Finite all the way: a step like any other, as torch takes it.
        assert run.skips() == 0
        assert all_finite(run.state())
        return
    skips = run.skips()
    assert skips > 0
    assert_same_bits(run.state(), before)
    if fault in ("scale_collapse", "fp16_accumulation"):
        assert run.scale() == 65536.0  # no scale could have helped
        assert {record.nature for record in run.records()} == {"collapse"}
    if fault == "inverse_scale":
        assert run.scale() == 1.0  # the floor; torch's would be at 2^-144, whose reciprocal is Inf
    drawn = torch.get_rng_state()
    twin = twin_of(run, optimizer, way, skips, precision=precision, clip=clip)
    assert_twins(run, twin, drawn)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nan_in_the_optimizers_state_is_an_error_that_changes_nothing(optimizer, way):
    run = WAYS[way](optimizer)
    run.clean(3)
    held = run.optimizer.state[run.first_weight()][STATE[optimizer]]
    good = held.clone()
    held[0, 0] = math.nan
    before = run.state()
    with pytest.raises(NonFiniteError, match=f"optimizer state '{STATE[optimizer]} of .*' held 1 NaN before the step"):
        run.take(*run.batch())
    assert_same_bits(run.state(), before)
    held.copy_(good)
    drawn = torch.get_rng_state()
    assert_twins(run, twin_of(run, optimizer, way, 1), drawn)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_learning_rate_of_nan_is_an_error_that_changes_nothing(optimizer, way):
    run = WAYS[way](optimizer)
    run.clean(3)
    group = run.optimizer.param_groups[0]
    rate, group["lr"] = group["lr"], math.nan
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ArgumentError, match="lr of parameter group 0 is nan"):
        run.take(*run.batch())
    assert_same_bits(run.model.state_dict(), before)
    group["lr"] = rate
    drawn = torch.get_rng_state()
    assert_twins(run, twin_of(run, optimizer, way, 1), drawn)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finite_gradients_whose_norm_overflows_never_stop_the_learning(optimizer, way):
    # In fp32 the norm is Inf and the clip factor 0: torch's chain takes a step of nothing, and says nothing.
    run = WAYS[way](optimizer, clip=1.0)
    run.clean(3)
    before = run.state()
    gradients(lambda gradient: torch.full_like(gradient, 1e20), every=True)(run)
    assert all_finite(run.state())
    if way == "drop_in":
        assert run.records()[0].where == "norm"
        assert_same_bits(run.state(), before)
    else:
        assert run.skips() == 0
        assert not torch.equal(run.first_weight(), next(iter(before[0].values())))
    run.clean(2)
