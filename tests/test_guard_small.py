"""The guarded step of small networks on CUDA: the switch, the reasons it gives, and the device's own decisions."""

import gc

import closeness
import pytest
import torch

from mlpkit._ext import _C
from mlpkit.guard import TrainStep
from mlpkit.guard.small import SmallWindow
from mlpkit.nn import MLP


def make_step(device="cpu", p=0.0, **options):
    torch.manual_seed(1)
    model = MLP(12, [40, 24], 5, dropout=p).to(device)
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, **fused)
    return TrainStep(model, "cross_entropy", optimizer, precision="bf16", **options)


def make_batch(device="cpu", rows=70):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 12, generator=generator)
    return x.to(device), torch.randint(0, 5, (rows,), generator=generator).to(device)


@pytest.fixture
def small():
    before = _C.cuda_kernels()
    _C.force_cuda_kernels("all")
    yield
    _C.force_cuda_kernels(before)


def test_kernels_without_a_proof_are_not_taken_unasked():
    step = make_step()
    step(*make_batch())
    assert "MLPKIT_CUDA_KERNELS=all" in step._small.never
    assert step.path != "small"


@pytest.mark.usefixtures("small")
def test_without_cuda_the_reason_says_so():
    step = make_step()
    result = step(*make_batch())
    assert "CUDA" in step._small.never
    assert not result.skipped
    assert step.path != "small"


def outcome(loss=1.5, norm=2.0, taken=1.0):
    return torch.tensor([loss, norm, 1.0, taken, 0.0], dtype=torch.float64)


def test_a_taken_step_leaves_no_record():
    step = make_step()
    window = SmallWindow(outcome(), step)
    assert window.record is None
    assert step.records == []
    assert step.skipped == 0


@pytest.mark.parametrize(
    ("loss", "norm", "culprit", "kind"),
    [
        (float("nan"), 2.0, "loss", "NaN"),
        (float("inf"), float("nan"), "loss", "Inf"),
        (1e39, 2.0, "loss", "Inf"),
        (1.0, float("inf"), "gradient norm", "Inf"),
    ],
)
def test_a_skip_is_recorded_once_when_it_is_looked_at(loss, norm, culprit, kind):
    step = make_step()
    window = SmallWindow(outcome(loss, norm, taken=0.0), step)
    assert step.records == []
    record = window.record
    assert (record.culprit, record.kind, record.step) == (culprit, kind, 0)
    assert window.record is record
    assert step.records == [record]
    assert step.skipped == 1


def test_a_result_does_not_keep_its_step_alive():
    step = make_step()
    window = SmallWindow(outcome(taken=0.0), step)
    del step
    gc.collect()
    assert window.record.culprit == "gradient norm"


def warm(step, batch):
    """The first step makes the optimizer's state, the general way."""
    step(*batch)
    return step


@pytest.mark.cuda
def test_on_cuda_parameters_err_no_more_than_the_general_way(small):
    ours, stock, exact = [], [], []
    for seed in closeness.SEEDS:
        found = []
        for which in ("small", "general", "exact"):
            _C.force_cuda_kernels("all" if which == "small" else "proven")
            step = make_step("cuda")
            if which == "exact":
                step.model.double()
                step = TrainStep(step.model, "cross_entropy", torch.optim.Adam(step.model.parameters(), lr=1e-2))
            batches = [make_batch("cuda", 64 + seed) for _ in range(3)]
            for x, target in batches:
                step(x.double() if which == "exact" else x, target)
            assert (step.path == "small") == (which == "small")
            found.append(torch.cat([one.detach().flatten().cpu() for one in step.model.parameters()]))
        for to, one in zip((ours, stock, exact), found):
            to.append(one)
    closeness.assert_no_worse_than(ours, stock, exact, "parameters")


@pytest.mark.cuda
def test_on_cuda_two_runs_are_bitwise_equal(small):
    runs = []
    for _ in range(2):
        step = warm(make_step("cuda", p=0.3), make_batch("cuda"))
        for _ in range(5):
            step(*make_batch("cuda"))
        assert step.path == "small"
        runs.append([one.detach().clone() for one in step.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.cuda
def test_on_cuda_a_bad_batch_changes_nothing(small):
    step = warm(make_step("cuda", p=0.3), make_batch("cuda"))
    x, target = make_batch("cuda")
    x[3, 4] = float("inf")
    state = [value for entry in step.optimizer.state.values() for value in entry.values()]
    before = [one.detach().clone() for one in (*step.model.parameters(), *state)]
    result = step(x, target)
    assert step.path == "small"
    assert result.skipped
    assert result.culprit == "loss"
    assert all(torch.equal(a, b) for a, b in zip((*step.model.parameters(), *state), before))


@pytest.mark.cuda
def test_on_cuda_a_captured_step_goes_on_like_separate_ones(small):
    results = []
    for captured in (False, True):
        step = warm(make_step("cuda", p=0.3), make_batch("cuda"))
        x, target = make_batch("cuda")
        step(x, target)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(x, target)
            for _ in range(10):
                graph.replay()
        else:
            for _ in range(10):
                step(x, target)
        results.append([one.detach().clone() for one in step.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.cuda
def test_on_cuda_a_step_does_not_wait_for_the_device(small):
    step = warm(make_step("cuda", p=0.3), make_batch("cuda"))
    batch = make_batch("cuda")
    step(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.path == "small"
    assert step.syncs == 0
