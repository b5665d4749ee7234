"""The native observer: it sees what the dispatcher runs, keeps what a diagnosis needs, and leaves Python alone."""

import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from mlpkit import _C
from mlpkit.errors import ArgumentError
from mlpkit.trace import Tracer
from mlpkit.trace._observer import Observer


def traced(program):
    with Tracer() as tracer:
        program()
    return tracer


def line_of(marker):
    with open(__file__) as lines:
        return next(number for number, line in enumerate(lines, 1) if f"# mark: {marker}" in line)


def test_a_healthy_operation_that_is_known_calls_no_python(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters())
    calls = []
    for name in ("judge", "rounded", "external", "reached", "escaped", "unknown_leaf", "learn", "recall"):
        original = getattr(Observer, name)
        monkeypatch.setattr(Observer, name, lambda *a, _o=original, _n=name: (calls.append(_n), _o(*a))[1])

    def loop(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(4, 8)), torch.randn(4, 2)).backward()
            optimizer.step()

    with Tracer(model) as tracer:
        loop(2)
        calls.clear()
        loop(5)
        assert calls == []
    assert tracer.diagnosis.verdict == "healthy"
    assert tracer.steps == 7
    assert tracer.operations > 7 * 20


def test_modules_are_followed_without_hooks_and_let_go():
    call = torch.nn.Module.__call__
    with Tracer():
        assert torch.nn.Module.__call__ is not call
        assert not torch_module._global_forward_hooks
        with Tracer(level="watch"):
            assert not torch_module._global_forward_hooks
    assert torch.nn.Module.__call__ is call
    assert not _C.followed()


def test_no_dispatch_mode_stands_between_the_program_and_its_operations():
    with Tracer():
        assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: torch.optim.SGD(p, lr=1e35),
        lambda p: torch.optim.SGD(p, lr=1e35, foreach=True),
        lambda p: torch.optim.SGD(p, lr=1e35, fused=True),
    ],
)
def test_the_operands_of_an_update_that_overflows_are_those_from_before(optimizer_of):
    w = torch.full((3,), 2.0, requires_grad=True)
    optimizer = optimizer_of([w])

    def program():
        (w * 1e5).sum().backward()
        optimizer.step()

    found = traced(program).diagnosis
    assert (found.verdict, found.phase) == ("failure", "optimizer")
    assert 2.0 in found.evidence["operands"].values()


def test_an_in_place_operation_that_overflows_shows_what_it_overwrote():
    def program():
        x = torch.full((4,), 300.0, dtype=torch.float16)
        x.mul_(300.0)
        (x * torch.ones(4, dtype=torch.float16, requires_grad=True)).sum().backward()

    found = traced(program).diagnosis
    assert (found.op, found.cause) == ("mul_", "overflow")
    assert found.evidence["operands"]["self"] == 300.0
    assert found.evidence["exact"] == 90000.0


def test_backward_operations_are_mapped_to_the_forward_line():
    def program():
        x = torch.zeros(2, requires_grad=True)
        y = torch.sqrt(x)  # mark: root
        y.sum().backward()

    found = traced(program).diagnosis
    assert (found.phase, found.node) == ("backward", "SqrtBackward0")
    assert found.location.endswith(f"test_trace_observe.py:{line_of('root')}")


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2  # mark: forward of a function

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.full((), math.inf) * 0


def test_a_custom_function_is_mapped_to_its_forward():
    def program():
        Twice.apply(torch.ones(2, requires_grad=True)).sum().backward()

    found = traced(program).diagnosis
    assert (found.phase, found.op, found.node) == ("backward", "mul", "TwiceBackward")
    assert found.location.endswith(f":{line_of('forward of a function')}")


def test_under_autocast_the_cast_is_the_operation_that_overflows():
    def program():
        layer = nn.Linear(4, 2, bias=False)
        with torch.autocast("cpu", torch.float16):
            layer(torch.full((2, 4), 1e5)).float().sum().backward()

    found = traced(program).diagnosis
    assert (found.op, found.cause, found.dtype) == ("_to_copy", "cast_overflow", "float16")


def test_a_checkpointed_forward_that_runs_again_is_forward():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def program():
        x = torch.ones(2, 4, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False)
        torch.log(y * 0).sum().backward()

    assert next((one.phase, one.op) for one in traced(program).diagnoses) == ("forward", "log")


def test_the_module_is_that_of_the_innermost_call_and_modules_may_come_and_go():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x):
            with torch.no_grad():
                self.inner[1].weight.fill_(math.nan)
            return self.inner[1](self.inner[0](x))

    def program():
        for _ in range(3):
            Outer()(torch.ones(1, 2)).sum().backward()

    found = traced(program).diagnosis
    assert (found.verdict, found.phase, found.cause) == ("failure", "source", "external")
    assert found.module in ("inner.1", "")


def test_parameters_that_move_to_other_memory_keep_their_names():
    model = nn.Linear(2, 2)
    with Tracer() as tracer:
        model(torch.ones(1, 2))
        model.double()
        model(torch.ones(1, 2, dtype=torch.float64))
        assert tracer._observer.ledger.find(model.weight).name == "weight"


def test_strided_expanded_and_empty_results_are_seen():
    def program():
        x = torch.randn(4, 6, requires_grad=True)
        (x.t() * 1.0)[:, ::2].sum().backward()
        torch.empty(0, 3) + 1
        bad = torch.log(x.detach().t() * 0)
        (bad * x.t()).sum().backward()

    found = traced(program).diagnosis
    assert (found.op, found.cause) == ("log", "log_of_zero")


def test_a_forked_child_is_not_observed():
    with Tracer() as tracer:
        child = os.fork()
        if child == 0:
            torch.log(torch.zeros(1))
            os._exit(0 if not tracer._native.here() else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0
    assert tracer.operations == 0


def test_an_error_inside_the_tracer_never_reaches_the_program(monkeypatch):
    def broken(*_):
        raise ValueError("broken")

    seen = []
    monkeypatch.setattr(Observer, "judge", broken)
    monkeypatch.setattr("sys.unraisablehook", lambda told: seen.append(told.exc_type))
    with Tracer():
        assert torch.log(torch.zeros(1)).item() == -math.inf
    assert seen == [ValueError]


def test_more_than_eight_tracers_inside_each_other_are_refused():
    def nest(depth):
        if depth:
            with Tracer():
                nest(depth - 1)

    nest(8)
    with pytest.raises(ArgumentError, match="eight tracers"):
        nest(9)


def test_a_printed_result_is_still_what_came_out(capsys):
    def program():
        logits = torch.tensor([1.0, 2.0, 100.0])
        held.append(logits.exp() / logits.exp().sum())
        print(held[0])

    held, text = [], torch._tensor_str._str
    assert "exp in float32 gave Inf" in traced(program).diagnosis.sentence
    assert capsys.readouterr().out == "tensor([0., 0., nan])\n"
    assert torch._tensor_str._str is text


def test_a_cell_of_a_notebook_is_named_as_ipython_numbers_it(monkeypatch):
    name = "/tmp/ipykernel_1/123.py"
    shell = SimpleNamespace(compile=SimpleNamespace(_filename_map={name: 7}))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    cell = compile("def run():\n\n    return torch.log(torch.zeros(2)).sum().item()", name, "exec")
    scope = {"torch": torch}
    exec(cell, scope)
    with Tracer() as tracer:
        scope["run"]()
    assert tracer.diagnosis.location == "In[7]:3"
