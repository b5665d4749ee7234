"""The population's CUDA kernels, run thread by thread on the CPU through ``Population(..., device="cuda")`` itself."""

import population_device_cases as cases
import pytest
import torch
from emulated_population import EmulatedPopulations
from emulator import find_compiler
from population_cases import assert_same_bits, classes_table, population, state
from population_steps import CASES, assert_bf16_errs_no_more_than_autocast, assert_five_steps_err_no_more_than_torchs

from mlpkit._ext import _C
from mlpkit.errors import DeviceError
from mlpkit.population import Member

DEVICE = {"device": "cuda"}
WITHOUT_NORM = [name for name, (_, fields) in CASES.items() if "norm" not in fields]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    return EmulatedPopulations(compiler, tmp_path_factory.mktemp("population"))


@pytest.fixture
def device(emulator):
    with emulator.offered():
        yield DEVICE


def test_a_member_is_the_same_alone_among_many_and_in_any_order(device):
    cases.check_company_and_order(**device)


def test_blocks_and_their_number_change_no_bit(emulator):
    table, members, found = classes_table(), cases.mixed(), []
    for multiprocessors in (1, 5):
        with emulator.offered(multiprocessors):
            trained = population(members, table, **DEVICE).fit()
            found.append([state(trained, index) for index in range(len(members))])
    for index, (one, other) in enumerate(zip(*found, strict=True)):
        assert_same_bits(one, other, f"member {index}")


def test_increments_and_files_go_on_bit_for_bit(device, tmp_path):
    cases.check_increments_and_files(tmp_path, **device)


def test_what_is_not_finite_in_one_member_changes_no_bit_of_another(device):
    cases.check_faults_stay_at_home(**device)


@pytest.mark.parametrize("name", WITHOUT_NORM)
def test_five_steps_from_copied_state_err_no_more_than_torchs(device, name):
    assert_five_steps_err_no_more_than_torchs(name, **device)


def test_bf16_errs_no_more_than_autocast(device):
    assert_bf16_errs_no_more_than_autocast(**device)


def test_masks_are_the_processors_bit_for_bit(device):
    cases.check_masks(**device)


@pytest.mark.parametrize("kind", cases.LOSSES)
def test_scores_best_epochs_and_reasons_to_stop_are_the_processors(device, kind):
    cases.check_scores(kind, **device)


def test_ragged_sizes_and_batches_of_several_passes(device):
    cases.check_sizes(**device)


def test_little_shared_memory_means_more_passes_and_gradients_elsewhere(emulator):
    table = classes_table(200)
    member = Member(hidden=(30, 20), activation="gelu", dropout=0.2, batch_size=150, epochs=2, optimizer="sgd")
    found = []
    for shared_bytes in (227 * 1024, 24 * 1024):
        with emulator.offered(shared_bytes=shared_bytes):
            trained = population([member], table, **DEVICE).fit()
            found.append(trained.predict(table[0]).flatten().tolist())
    roomy, tight = (
        emulator.plan([6, 30, 20, 3], 150, precision="fp32", keeps_slopes=True, moments=0, shared_bytes=kilobytes << 10)
        for kilobytes in (227, 24)
    )
    assert roomy["rows"] > tight["rows"]
    assert not tight["gradients_in_shared"]
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_as_many_blocks_fit_a_multiprocessor_as_the_napkin_says(emulator):
    assert emulator.plan([128, 64, 64, 10], 128)["resident"] == 2
    assert emulator.plan([128, 16, 16, 10], 128)["resident"] >= 6
    assert emulator.plan([128, 256, 256, 10], 128)["resident"] == 1
    assert emulator.plan([128, 256, 256, 10], 128, precision="fp32") is None


def test_many_steps_are_one_launch(emulator, device):
    table, before = classes_table(), emulator.launches
    members = [Member(hidden=(8,), epochs=4, batch_size=8, seed=seed) for seed in range(5)]
    population(members, table, **device).train(1)
    assert emulator.launches == before + 1


def test_what_does_not_fit_is_refused_by_name(device):
    cases.check_refusals(**device)


def test_unproven_kernels_are_asked_for(device):
    _C.force_cuda_kernels("proven")
    with pytest.raises(DeviceError, match="MLPKIT_CUDA_KERNELS=all"):
        population([Member()], classes_table(), **device)


def test_predictions_with_last_weights_and_for_a_member_twice(device):
    X, y = classes_table()
    members = [Member(hidden=(9,), epochs=3, seed=seed, lr=0.1) for seed in range(3)]
    trained = population(members, (X, y), validation=0.2, **device).fit()
    twice = trained.predict(X, ids=[1, 1, 0], weights="last")
    assert torch.equal(twice[0], twice[1])
    module = trained.export(1, weights="last").to_sequential().eval()
    assert twice[0].flatten().tolist() == pytest.approx(module(X).flatten().tolist(), rel=1e-4, abs=1e-5)
