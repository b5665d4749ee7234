"""A forward that holds Inf itself: a step in float32, what the scale does, what records and headroom say."""

import copy
import math

import pytest
import torch
from guard_runs import PARTS, Run, assert_same_bits, bad, gradient_of, inf_in_one_element
from torch import nn

from mlpkit.errors import NonFiniteError
from mlpkit.guard import TrainStep
from mlpkit.trace import Tracer


class Grows(nn.Module):
    """Overflows in float16, and is fine in float32."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.norm(self.linear(x))) * 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_collapse_is_taken_in_float32_where_asked_for(accumulate):
    def run(precision, x, **options):
        torch.manual_seed(5)
        model = Grows()
        step = TrainStep(
            model,
            "mse",
            torch.optim.Adam(model.parameters(), lr=0.1),
            precision=precision,
            accumulate=accumulate,
            **options,
        )
        results = [step(x, torch.zeros(8, 5)) for _ in range(accumulate)]
        return model, step, results

    torch.manual_seed(1)
    x = torch.randn(8, 5) * 3e5
    model, step, results = run("fp16", x, on_collapse="fp32_step")
    plain, _, _ = run("fp32", x)
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert not any(result.skipped for result in results)
    assert all(math.isfinite(result.loss) for result in results)
    record = step.records[0]
    assert (record.nature, record.action, record.taken) == ("collapse", "fp32 step", True)
    assert "Step taken in float32 instead" in str(record)
    assert (step.steps, step.skipped, step.scale) == (1, 0, 65536.0)
    skipped, other, _ = run("fp16", x)
    assert other.skipped == 1
    assert not torch.equal(skipped.linear.weight, model.linear.weight)


def test_the_step_in_float32_draws_no_more_random_numbers_and_may_fail_too():
    states = []
    for policy in ("skip", "fp32_step"):
        run = Run(precision="fp16", on_collapse=policy)
        run.take(1)
        before = run.state()
        x, y = run.batch()
        run.step(x * 1e30, y)
        states.append(run.state())
        assert_same_bits(run.state()[PARTS], before[PARTS])
    assert_same_bits(*states)
    assert "The step in float32 failed too" in str(run.step.records[0])


def test_collapse_and_calibration_are_told_apart():
    run = Run(precision="fp16", on_collapse="raise")
    with gradient_of(run.model[0].weight, inf_in_one_element):
        assert run.step(*run.batch()).record.nature == "calibration"
    x, y = run.batch()
    with pytest.raises(NonFiniteError, match=r"forward of 0 .*The forward itself held it: no loss scale can help"):
        run.step(x * 3e5, y)
    assert bad(run).record.nature == "data"  # nothing of the forward's doing


def test_a_record_knows_the_gradients_past_the_first_index_and_the_operation():
    run = Run(precision="fp16")
    run.take(2)
    with gradient_of(run.model[0].weight, inf_in_one_element):
        record = run.step(*run.batch()).record
    assert record.first_index == 2 * 5 + 1
    assert len(record.absmax) == 3
    assert all(math.isfinite(value) for value in record.absmax[:2])
    assert record.absmax[2] == math.inf
    assert record.op is None
    with Tracer(run.model):
        x, y = run.batch()
        record = run.step(x * 3e5, y).record
    assert (record.op, record.module, record.cause) == ("_to_copy", "0", "cast_overflow")
    assert "It began in _to_copy of 0." in str(record)


def test_headroom_is_in_bits_below_the_dtypes_limit():
    run = Run(precision="fp16", init_scale=1024.0)
    seen = {}
    handles = [
        p.register_hook(lambda g, n=n: seen.__setitem__(n, float(g.abs().max())))
        for n, p in run.model.named_parameters()
    ]
    run.take(1)
    for handle in handles:
        handle.remove()
    expected = {name: math.log2(65504 / value) for name, value in seen.items()}
    assert run.step.headroom == pytest.approx(expected, rel=1e-6)


def test_a_scale_so_low_that_every_gradient_is_flushed_to_zero_grows_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    step = TrainStep(
        model, lambda y, _: y.mean() * 1e-8, torch.optim.SGD(model.parameters(), 1.0), precision="fp16", init_scale=1.0
    )
    before = copy.deepcopy(model.state_dict())
    for _ in range(12):
        step(torch.randn(8, 4))
    assert {change.reason for change in step.scale_changes} == {"underflow"}
    assert 1.0 < step.scale < 2.0**12  # until some of them were there again, and no further
    assert not torch.equal(model[1].weight, before["1.weight"])
