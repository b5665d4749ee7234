"""The operator behind guarded updates: its contract, tensor by tensor."""

import math

import pytest
import torch
from guarded_update_cases import assert_same

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DeviceError
from mlpkit.functional import guarded_update
from mlpkit.ops.guarded_update import GroupSettings, Reason, ScaleRule

ADAM = GroupSettings()


class Tensors:
    """Parameters, gradients and state of Adam."""

    def __init__(self, sizes=(40, 7), dtype=torch.float32, gradient=None, copy=None):
        generator = torch.Generator().manual_seed(0)
        draw = lambda size: torch.randn(size, generator=generator)  # noqa: E731
        self.params = [draw(size).to(dtype) for size in sizes]
        self.grads = [draw(size).to(gradient or dtype) for size in sizes]
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.steps = [torch.tensor(0.0) for _ in sizes]
        self.copies = [p.to(copy) for p in self.params] if copy else []

    def written(self):
        lists = {"p": self.params, "m": self.first, "v": self.second, "t": self.steps, "copy": self.copies}
        return {(name, i): one.clone() for name, tensors in lists.items() for i, one in enumerate(tensors)}

    def update(self, settings=ADAM, kind="adam", **options):
        state = {"first": self.first, "second": self.second, "steps": self.steps, "copies": self.copies}
        return guarded_update(self.params, self.grads, kind=kind, settings=[settings], **state, **options)


def test_outcome_and_census_say_what_was_seen():
    tensors = Tensors()
    tensors.grads[1][3] = -9.0
    outcome, census = tensors.update(clip_norm=0.5)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in tensors.grads))
    assert outcome.tolist() == pytest.approx([1, Reason.TAKEN, norm, 0.5 / norm, -1, 0])
    assert census[1].tolist() == pytest.approx([0, 0, -1, 9.0, float(tensors.grads[1].double().square().sum())])
    tensors.grads[1][5], tensors.grads[1][2], tensors.grads[0][9] = math.nan, math.inf, -math.inf
    before = tensors.written()
    outcome, census = tensors.update()
    assert_same(before, tensors.written())
    assert outcome[[0, 1, 4, 5]].tolist() == [0, Reason.GRADIENT, 0, 2]
    assert math.isnan(outcome[2])
    assert census[:, :3].tolist() == [[0, 1, 9], [1, 1, 2]]


def test_the_sum_of_squares_is_that_of_fp64():
    tensors = Tensors((300_001,))
    tensors.grads[0] *= 1e20
    outcome, census = tensors.update()
    exact = math.fsum((tensors.grads[0].double() ** 2).tolist())
    assert abs(census[0, 4].item() / exact - 1) < 1e-12
    assert outcome[0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_low_precision_copy_follows_its_master(dtype):
    tensors, plain = Tensors(gradient=dtype, copy=dtype), Tensors(gradient=dtype)
    tensors.update()
    plain.update()
    for master, same, copy in zip(tensors.params, plain.params, tensors.copies):
        assert torch.equal(master, same)
        assert torch.equal(copy, master.to(dtype))


def test_a_copy_that_would_overflow_forbids_the_step():
    tensors = Tensors(gradient=torch.float16, copy=torch.float16)
    tensors.params[0][3] = 65519.0
    before = tensors.written()
    outcome, _ = tensors.update(GroupSettings(lr=-4.0))
    assert outcome[[0, 1, 4]].tolist() == [0, Reason.UPDATE, 0]
    assert_same(before, tensors.written())


def test_bounds_are_read_where_unknown_and_left_for_the_next_call():
    tensors = Tensors()
    bounds = torch.full((2, 4), math.nan, dtype=torch.float64)
    tensors.update(bounds=bounds)
    largest = [[float(x.abs().max()) for x in rows] for rows in zip(tensors.params, tensors.first, tensors.second)]
    assert bounds[:, :3].tolist() == largest
    tensors.first[1].fill_(math.inf)
    bounds[1] = math.nan
    before = tensors.written()
    outcome, _ = tensors.update(bounds=bounds)
    assert outcome[[0, 1, 4]].tolist() == [0, Reason.UPDATE, 1]
    assert_same(before, tensors.written())


def test_force_shows_what_would_come_of_it():
    tensors = Tensors()
    tensors.grads[0][3] = math.nan
    outcome, _ = tensors.update(force=True)
    assert outcome[:2].tolist() == [1, Reason.GRADIENT]
    assert torch.isnan(tensors.params[0][3])
    assert tensors.steps[0] == 1


def test_flags_and_scale_move_as_in_torch():
    tensors = Tensors()
    scale, clean, found = torch.tensor(4.0), torch.tensor(0, dtype=torch.int32), torch.tensor(1.0)
    state = {"scale": scale, "clean_steps": clean, "found_inf": found, "rule": ScaleRule(interval=2)}
    before = tensors.written()
    assert tensors.update(**state).outcome[1] == Reason.GRADIENT
    assert_same(before, tensors.written())
    assert (scale.item(), clean.item(), found.item()) == (2.0, 0, 1.0)
    found.zero_()
    tensors.update(**state)
    assert (scale.item(), clean.item(), found.item()) == (2.0, 1, 0.0)
    tensors.update(**state)
    assert (scale.item(), clean.item()) == (4.0, 0)


def test_a_parameter_seen_by_autograd_counts_as_changed():
    tensors = Tensors()
    versions = [p._version for p in tensors.params]
    tensors.update()
    assert all(p._version > version for p, version in zip(tensors.params, versions))
    tensors.grads[0][0] = math.nan
    versions = [p._version for p in tensors.params]
    tensors.update()
    assert [p._version for p in tensors.params] == versions


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_every_instruction_set_computes_the_same_within_rounding(capability):
    before = _C.cpu_capability()
    results = []
    try:
        for name in ("default", capability):
            _C.force_cpu_capability(name)
            tensors = Tensors((129, 1030))
            tensors.update()
            results.append(tensors)
    finally:
        _C.force_cpu_capability(before)
    for a, b in zip(results[0].params, results[1].params):
        torch.testing.assert_close(a, b)


def test_the_operator_is_lawful():
    tensors = Tensors((5, 3))
    arguments = (tensors.params, tensors.grads, tensors.first, tensors.second, [], [], tensors.steps)
    numbers = [1e-3, 0.9, 0.999, 1e-8, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    torch.library.opcheck(
        torch.ops.mlpkit.guarded_update,
        (*arguments, None, None, None, None, "adam", [0, 0], numbers, math.inf, 2.0, 0.5, 0, 1.0, 65536.0, False),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(kind="sgdm"), "kind is 'sgdm'; it must be one of"),
        (lambda t: t.update(clip_norm=0.0), "clip_norm is 0"),
        (lambda t: t.update(GroupSettings(amsgrad=True)), "these settings need state that was not given"),
        (lambda t: t.update(scale=torch.ones(2)), "must be one float32 number"),
        (lambda t: t.update(bounds=torch.zeros(1, 4)), r"must be contiguous float64 \(2, 4\)"),
        (lambda t: t.update(groups=[0, 1]), "group index 1 of 1 groups"),
        (lambda t: (t.grads.pop(), t.update()), "2 params, 1 grads"),
        (lambda t: (t.first.pop(), t.update()), "first has 1 tensors, params has 2"),
        (lambda t: (t.first.__setitem__(0, torch.zeros(9)), t.update()), "a state tensor is Float of shape"),
        (lambda t: (t.grads.__setitem__(0, torch.zeros(9)), t.update()), "a gradient is"),
        (lambda t: (t.params.__setitem__(0, torch.zeros(80)[::2]), t.update()), "has gaps or overlaps"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises((ArgumentError, ValueError), match=message):
        change(Tensors())


def test_nothing_and_other_devices_are_refused():
    with pytest.raises(ArgumentError, match="params is empty"):
        guarded_update([], [], kind="sgd", settings=[ADAM], steps=[])
    tensors = Tensors()
    with pytest.raises(DeviceError, match="parameter 0 is on"):
        guarded_update([torch.empty(1).as_subclass(Elsewhere)], [], kind="sgd", settings=[ADAM], steps=tensors.steps)


class Elsewhere(torch.Tensor):
    """Says that it lies on a device that this machine may not have."""

    @property
    def device(self):
        return torch.device("cuda")
