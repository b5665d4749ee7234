"""The CUDA kernels of guarded_update, run thread by thread on the CPU: the bits of the CPU's own kernels."""

import math

import pytest
import torch
from closeness import assert_within_ulps
from emulator import find_compiler
from guarded_device import GuardedDevice, Session, Tensors

from mlpkit._ext import _C
from mlpkit.ops.guarded_update import GroupSettings, Reason, ScaleRule


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    device = GuardedDevice(compiler, tmp_path_factory.mktemp("update"))
    device.become(1)
    return device


@pytest.fixture(autouse=True)
def _without_multiply_add():
    """The `default` instruction set contracts nothing, like the emulator: the same formulas give the same bits."""
    before = _C.cpu_capability()
    _C.force_cpu_capability("default")
    yield
    _C.force_cpu_capability(before)


SETTINGS = [
    ("sgd", GroupSettings(weight_decay=0.1)),
    ("sgd", GroupSettings(momentum=0.9, nesterov=True, l1=0.01)),
    ("sgd", GroupSettings(momentum=0.9, dampening=0.5)),
    ("adam", GroupSettings(weight_decay=0.1, amsgrad=True, maximize=True)),
    ("adamw", GroupSettings(weight_decay=0.1)),
    ("rmsprop", GroupSettings(momentum=0.9)),
    ("rmsprop", GroupSettings(centered=True)),
    ("lars", GroupSettings(momentum=0.9, weight_decay=0.1)),
    ("lamb", GroupSettings(weight_decay=0.1, l1=0.01)),
]
NAMES = [f"{kind}{i}" for i, (kind, _) in enumerate(SETTINGS)]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.all(), theirs.all(), strict=True))


def both(*arguments, **options):
    return Tensors(*arguments, **options), Tensors(*arguments, **options)


def assert_same_decision(ours, theirs):
    outcome, census = ours
    assert outcome[[0, 1, 4, 5]].tolist() == theirs.outcome[[0, 1, 4, 5]].tolist()
    assert outcome[2:4].tolist() == pytest.approx(theirs.outcome[2:4].tolist(), rel=1e-12, nan_ok=True)
    assert torch.equal(census[:, :4], theirs.census[:, :4])
    assert census[:, 4].tolist() == pytest.approx(theirs.census[:, 4].tolist(), rel=1e-12)


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=NAMES)
def test_updates_have_the_cpus_bits(device, kind, settings):
    # Norms of a tensor are summed in another order than on the CPU: lars' and lamb's rates, which are rounded to
    # float32, agree nevertheless here.
    ours, theirs = both(kind, settings)
    session = Session(device, ours)
    for _ in range(2):
        assert_same_decision(session.step(clip_norm=0.5), theirs.on_cpu(clip_norm=0.5))
        assert same(ours, theirs)
    largest = [[float(t[i].abs().max()) if t and t[i].numel() else 0.0 for t in (ours.p, *ours.state.values())]
               for i in range(len(ours.p))]  # fmt: skip
    assert session.bounds.tolist() == largest
    assert session.log[:2] == (2, 0)
    session.close()


@pytest.mark.parametrize(
    ("dtype", "gradient", "copy"),
    [
        (torch.float64, None, None),
        (torch.bfloat16, None, None),
        (torch.float16, None, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, None, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "rmsprop", "lamb"])
def test_other_dtypes_and_alignments(device, kind, dtype, gradient, copy, shift):
    ours, theirs = both(kind, GroupSettings(momentum=0.9), dtype, gradient, (700, 33), shift, copy)
    session = Session(device, ours)
    assert_same_decision(session.step(), theirs.on_cpu())
    if (kind, dtype) == ("lamb", torch.float64):  # where the order of the sums shows
        before = Tensors(kind, GroupSettings(momentum=0.9), dtype, gradient, (700, 33), shift, copy)
        for a, b, c in zip(ours.all(), theirs.all(), before.all(), strict=True):
            assert_within_ulps(a, b, c, ulps=1)
    else:
        assert same(ours, theirs)
    session.close()


def test_rows_of_many_chunks(device):
    # Chunks of 8: rows that a block, a warp and a thread add up.
    ours, theirs = both("lamb", GroupSettings(weight_decay=0.1), sizes=(130, 9, 4104, 0))
    session = Session(device, ours, chunk=8)
    assert_same_decision(session.step(), theirs.on_cpu())
    assert same(ours, theirs)
    session.close()


def test_addresses_and_settings_that_lie_on_the_device(device):
    """As they do where there are more than the arguments of a launch hold."""
    ours, theirs = both("sgd", GroupSettings(momentum=0.9, maximize=True), sizes=(3,) * 20)
    session = Session(device, ours)
    assert_same_decision(session.step(inline=False), theirs.on_cpu())
    assert same(ours, theirs)
    session.close()


def test_the_grid_changes_no_bit(device):
    runs = []
    for multiprocessors in (1, 5):
        device.become(multiprocessors)
        tensors = Tensors("lamb", GroupSettings(weight_decay=0.1))
        session = Session(device, tensors, chunk=512)
        outcome, census = session.step(clip_norm=0.5)
        runs.append([outcome, census, *tensors.all()])
        session.close()
    device.become(1)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("place", [0, 8999])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bad_gradient_changes_nothing(device, value, place):
    ours, before = both("adam", GroupSettings())
    ours.g[1][place] = ours.g[1][8192] = value
    scale, clean, found = torch.tensor(64.0), torch.tensor(5, dtype=torch.int32), torch.tensor(0.0)
    session = Session(device, ours)
    outcome, census = session.step(1.0, scale, clean, found, ScaleRule(interval=10))
    assert same(ours, before)
    assert outcome[0] == 0
    assert outcome[[1, 4, 5]].tolist() == [Reason.GRADIENT, 1, 1]
    assert census[1, :3].tolist() == [2.0 * math.isnan(value), 2.0 * math.isinf(value), min(place, 8192)]
    assert (scale.item(), clean.item(), found.item()) == (32.0, 0, 1.0)
    steps, skips, last = session.log
    assert (steps, skips) == (1, 1)
    assert last[0, [0, 1, 4, 5, 6]].tolist() == [0, Reason.GRADIENT, 1, 1, 64.0]
    assert torch.equal(last[0, 7:], census[1])
    # What was read is known although the step was not taken, and the next step is the twin's first.
    ours.g[1] = before.g[1]
    session.step()
    before.on_cpu()
    assert same(ours, before)
    session.close()


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        ({"found_inf": 1.0}, {}, Reason.GRADIENT),
        ({"scale": 1e-42}, {}, Reason.SCALE),
        ({"scale": 0.0}, {}, Reason.SCALE),
        ({}, {"lr": math.nan}, Reason.SETTING),
    ],
    ids=str,
)
def test_what_else_forbids_a_step(device, options, settings, reason):
    options = {name: torch.tensor(value) for name, value in options.items()}
    ours, before = both("adamw", GroupSettings(**settings), sizes=(33,))
    session = Session(device, ours)
    outcome, _ = session.step(**options)
    assert outcome[:2].tolist() == [0, reason]
    assert same(ours, before)
    session.close()


@pytest.mark.parametrize("tries", [False, True])
@pytest.mark.parametrize("kind", ["adam", "rmsprop", "lamb"])
def test_an_update_in_doubt_is_tried_first(device, kind, tries):
    # eps 0 has a launch of its own; a state that holds -0 is in doubt too, and the deciding block tries it.
    settings = GroupSettings(eps=0.0) if tries else GroupSettings()
    ours, theirs = both(kind, settings, sizes=(33, 9000, 20))
    session = Session(device, ours)
    for run in (ours, theirs):
        run.state["second"][1][77] = -0.0
        if not tries:
            run.g[1][77] = 3e-30
    assert_same_decision(session.step(tries=tries), theirs.on_cpu())
    assert same(ours, theirs)
    for run in (ours, theirs):
        run.p[1][78] = 3e38 if tries else run.p[1][78]
        run.state["second"][1][77] = 0.0 if tries else 3.4e38
        run.g[1][77] = 0.0 if tries else 3e19
        if run.state["first"]:
            run.state["first"][1][77] = 0.0
    session.close()
    session = Session(device, ours)
    before = [tensor.clone() for tensor in ours.all()]
    ours_said, theirs_said = session.step(tries=tries), theirs.on_cpu()
    assert_same_decision(ours_said, theirs_said)
    assert ours_said[0][[0, 1, 4]].tolist() == [0, Reason.UPDATE, 1]
    assert all(torch.equal(a, b) for a, b in zip(ours.all(), before))
    assert session.log[:2] == (1, 1)
    # By force it is written all the same.
    session.step(tries=tries, force=True)
    assert not all(bool(torch.isfinite(tensor).all()) for tensor in ours.all())
    session.close()


def test_squares_that_double_cannot_hold(device):
    ours, theirs = both("sgd", GroupSettings(lr=1e-3), torch.float64, sizes=(700, 33))
    for run in (ours, theirs):
        run.g[0] *= 1e200
    session = Session(device, ours)
    assert_same_decision(session.step(clip_norm=1.0), theirs.on_cpu(clip_norm=1.0))
    before = Tensors("sgd", GroupSettings(lr=1e-3), torch.float64, sizes=(700, 33))
    for a, b, c in zip(ours.p, theirs.p, before.p, strict=True):
        assert_within_ulps(a, b, c)
    session.close()


def test_the_scale_grows_and_the_rate_lies_on_the_device(device):
    ours, theirs = both("sgd", GroupSettings(lr=0.25), sizes=(700, 33))
    ours.settings = GroupSettings(lr=99.0)
    scale, clean = torch.tensor(8.0), torch.tensor(1, dtype=torch.int32)
    session = Session(device, ours)
    said = session.step(0.5, scale, clean, None, ScaleRule(interval=2), rate=torch.tensor(0.25))
    assert_same_decision(said, theirs.on_cpu(clip_norm=0.5, scale=torch.tensor(8.0)))
    assert (scale.item(), clean.item()) == (16.0, 0)
    assert same(ours, theirs)
    session.close()


def test_a_row_without_gradient_or_step_count(device):
    settings = GroupSettings(momentum=0.9, dampening=0.5)
    ours, theirs = both("sgd", settings, sizes=(700, 33, 9), steps=False)
    idle = [tensor.clone() for tensor in (ours.p[1], ours.state["first"][1])]
    for run in (ours, theirs):
        run.g[1] = None
    session = Session(device, ours)
    # The first step taken sets the momentum: a skipped one does not count as it.
    session.step(found_inf=torch.tensor(1.0))
    for taken in range(2):
        outcome, census = session.step()
        assert outcome[0] == 1
        assert census[1].tolist() == [0, 0, -1, 0, 0]
        for i in (0, 2):
            first, g = theirs.state["first"][i], theirs.g[i]
            first.copy_(g if taken == 0 else 0.5 * g + 0.9 * first)
            theirs.p[i].sub_(1e-3 * first)
            assert (ours.p[i] - theirs.p[i]).abs().max() < 1e-6
            assert (ours.state["first"][i] - first).abs().max() < 1e-6
    assert torch.equal(ours.p[1], idle[0])
    assert torch.equal(ours.state["first"][1], idle[1])
    session.close()
