"""Populations on a CUDA device: the checks that the emulated device passes, and what only a real one shows."""

from __future__ import annotations

import population_device_cases as cases
import pytest
import torch
from population_cases import assert_same_bits, classes_table, population, state
from population_steps import CASES, assert_bf16_errs_no_more_than_autocast, assert_five_steps_err_no_more_than_torchs

from mlpkit.population import Member

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("all_cuda_kernels")]

DEVICE = {"device": "cuda"}


def test_a_member_is_the_same_alone_among_many_and_in_any_order():
    cases.check_company_and_order(**DEVICE)


def test_two_runs_of_hundreds_agree_in_every_bit():
    table = classes_table(600, 40, 10)
    members = [
        Member(hidden=(8 * (1 + seed % 12),) * (seed % 4), dropout=0.1, epochs=3, batch_size=32 << seed % 4,
               precision=("bf16", "fp32")[seed % 2], seed=seed)
        for seed in range(400)
    ]  # fmt: skip
    one, other = (population(members, table, validation=0.2, metric="accuracy", **DEVICE).fit() for _ in range(2))
    for index in range(len(members)):
        assert_same_bits(state(one, index), state(other, index), f"member {index}")


def test_increments_and_files_go_on_bit_for_bit(tmp_path):
    cases.check_increments_and_files(tmp_path, **DEVICE)


def test_what_is_not_finite_in_one_member_changes_no_bit_of_another():
    cases.check_faults_stay_at_home(**DEVICE)


@pytest.mark.parametrize("name", [name for name, (_, fields) in CASES.items() if "norm" not in fields])
def test_five_steps_from_copied_state_err_no_more_than_torchs(name):
    assert_five_steps_err_no_more_than_torchs(name, **DEVICE)


def test_bf16_errs_no_more_than_autocast():
    assert_bf16_errs_no_more_than_autocast(**DEVICE)


def test_masks_are_the_processors_bit_for_bit():
    cases.check_masks(**DEVICE)


@pytest.mark.parametrize("kind", cases.LOSSES)
def test_scores_best_epochs_and_reasons_to_stop_are_the_processors(kind):
    cases.check_scores(kind, **DEVICE)


def test_ragged_sizes_and_batches_of_several_passes():
    cases.check_sizes(**DEVICE)


def test_what_does_not_fit_is_refused_by_name():
    cases.check_refusals(**DEVICE)


def test_tables_on_the_device_choose_it():
    X, y = classes_table()
    member = Member(hidden=(8,), epochs=2)
    there = population([member], (X.cuda(), y.cuda())).fit()
    assert_same_bits(state(there, 0), state(population([member], (X, y), **DEVICE).fit(), 0), "X on the device")
    assert torch.equal(there.predict(X.cuda()), there.predict(X))
