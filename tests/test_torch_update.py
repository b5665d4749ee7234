"""torch.optim's own optimizers by the guarded native call: every bit is that of their own step, or nothing happens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mlpkit import guard
from mlpkit.guard.update import FusedUpdate, as_torch_now, why_not

SIZES = (*range(1, 71), 1000, 4097)  # whole vectors of every instruction set, and every number left over
STEPS = 200

OPTIMIZERS = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=0.1, **how),
    "sgd, momentum": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, **how),
    "sgd, nesterov, decay": lambda p, **how: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **how
    ),
    "sgd, maximize": lambda p, **how: torch.optim.SGD(p, lr=0.01, momentum=0.9, maximize=True, **how),
    "adam": lambda p, **how: torch.optim.Adam(p, lr=0.01, **how),
    "adam, l2, amsgrad": lambda p, **how: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True, **how),
    "adam, maximize": lambda p, **how: torch.optim.Adam(p, lr=0.01, betas=(0.3, 0.9), maximize=True, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **how),
    "adamw, amsgrad": lambda p, **how: torch.optim.AdamW(p, lr=0.01, amsgrad=True, **how),
    "rmsprop": lambda p, **how: torch.optim.RMSprop(p, lr=0.01, **how),
    "rmsprop, momentum, l2": lambda p, **how: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, **how),
}
WAYS = {"each": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CASES = [(name, way) for name in OPTIMIZERS for way in WAYS if not (name.startswith("rmsprop") and way == "fused")]


def parameters(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def give_gradients(both, step):
    generator = torch.Generator().manual_seed(step)
    for a, b in zip(*both, strict=True):
        a.grad = torch.randn(a.shape, generator=generator).to(a.dtype)
        b.grad = a.grad.clone()


def state_of(optimizer):
    return [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in entries.items()}
        for entries in optimizer.state.values()
    ]


def same(ours, theirs, mine, other):
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert len(ours.state) == len(theirs.state)
    for a, b in zip(state_of(ours), state_of(theirs), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def compare(name, way, dtype=torch.float32, steps=STEPS, sizes=SIZES):
    mine, other = parameters(dtype, sizes), parameters(dtype, sizes)
    ours, theirs = (OPTIMIZERS[name](p, **WAYS[way]) for p in (mine, other))
    assert why_not(ours) is None
    update = FusedUpdate(ours)
    for step in range(steps):
        give_gradients((mine, other), step)
        assert update.step(ours).taken
        theirs.step()
    same(ours, theirs, mine, other)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_bit_is_that_of_the_optimizer(name, way):
    compare(name, way, steps=STEPS if name in ("sgd, momentum", "adam", "adamw") else 20)


@pytest.mark.parametrize("way", WAYS)
def test_float64(way):
    for name in ("sgd, momentum", "adam, l2, amsgrad"):
        compare(name, way, torch.float64, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_their_own_step(dtype):
    assert "neither float32 nor float64" in why_not(torch.optim.Adam(parameters(dtype, sizes=(3,))))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    program = "from test_torch_update import *\nfor case in CASES: compare(*case, steps=3)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent, env=environment)


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compare("adam", "each", steps=3, sizes=(100_003,))
        compare("adamw", "fused", steps=3, sizes=(100_003,))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_gradient_leaves_no_trace(way, bad):
    mine, other = parameters(sizes=(3, 40)), parameters(sizes=(3, 40))
    ours, theirs = (OPTIMIZERS["sgd, momentum"](p, **WAYS[way]) for p in (mine, other))
    update = FusedUpdate(ours)
    for step in range(4):
        give_gradients((mine, other), step)
        if step in (0, 2):
            mine[1].grad[17] = bad
            assert not update.step(ours).taken
            continue
        assert update.step(ours).taken
        theirs.step()
    same(ours, theirs, mine, other)


def test_what_no_bound_shows_is_not_taken():
    mine = parameters(sizes=(5,))
    optimizer = torch.optim.Adam(mine, lr=0.1, eps=1e-30)
    mine[0].grad = torch.full((5,), 1e15)
    assert not FusedUpdate(optimizer).step(optimizer).taken
    assert not optimizer.state


def test_a_bound_that_grew_too_wide_is_read_anew():
    # By the formula alone a step may be lr * g / (1 - beta1) / eps long: after a few of them nothing would be proven.
    mine, other = parameters(sizes=(5,)), parameters(sizes=(5,))
    ours, theirs = (torch.optim.Adam(p, lr=1.0, eps=1e-37) for p in (mine, other))
    update = FusedUpdate(ours)
    for step in range(40):
        for parameter in (*mine, *other):
            parameter.grad = torch.full((5,), 0.5 + 0.01 * step)
        assert update.step(ours).taken
        theirs.step()
    same(ours, theirs, mine, other)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.Adagrad(p), "Adagrad"),
        (lambda p: torch.optim.RMSprop(p, centered=True), "centred"),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True), "decoupled"),
        (lambda p: torch.optim.Adam(p, capturable=True), "capturable"),
    ],
)
def test_others_keep_their_own_step(make, reason):
    assert reason in why_not(make(parameters(sizes=(3,))))


def test_what_is_of_this_moment_keeps_the_own_step():
    optimizer = torch.optim.Adam(parameters(sizes=(3,)), lr=torch.tensor(0.1))
    assert not as_torch_now(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    assert as_torch_now(optimizer)
    optimizer.grad_scale = torch.ones(())
    assert not as_torch_now(optimizer)


def test_a_step_that_is_replaced_after_steps_were_taken_is_called():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = guard.TrainStep(model, "mse", optimizer)
    batch = torch.ones(4, 3), torch.zeros(4, 2)
    step(*batch)
    called, own = [], optimizer.step
    optimizer.step = lambda: called.append(own())
    step(*batch)
    assert called == [None]


def test_a_scheduler_sees_the_step():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step = guard.TrainStep(model, "mse", optimizer, scheduler=scheduler)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        assert not step(torch.ones(4, 3), torch.zeros(4, 2)).skipped
    assert rates == [0.1, 0.05, 0.025]
    assert step._decision.direct._update is not None


@pytest.mark.parametrize("name", ["sgd, momentum", "adam", "adamw"])
@pytest.mark.parametrize("way", WAYS)
def test_a_train_step_is_the_plain_loop(name, way):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3))

    mine, other = network(), network()
    ours, theirs = (OPTIMIZERS[name](model.parameters(), **WAYS[way]) for model in (mine, other))
    step = guard.TrainStep(mine, "mse", ours)
    for index in range(20):
        torch.manual_seed(index)
        inputs, target = torch.randn(6, 5), torch.randn(6, 3)
        theirs.zero_grad()
        nn.functional.mse_loss(other(inputs), target).backward()
        theirs.step()
        if index == 10:
            assert step(inputs * float("inf"), target).skipped
        assert not step(inputs, target).skipped
    assert step._decision.direct._update is not None  # the native call took them
    same(ours, theirs, list(mine.parameters()), list(other.parameters()))
