"""guard.optim: torch's updates bit for bit, LARS and LAMB after their papers."""

import math

import pytest
import torch
from closeness import assert_within_ulps
from guarded_update_cases import CASES, everything, give_gradients, make, parameters, take_over

from mlpkit._ext import _C

INF, NAN = math.inf, math.nan


HAS_FMA, LANES = _C.cpu_capability() != "default", 16


def assert_as_stated(case, mine, stock, before, what):
    """Bitwise in the vectors of torch's fused kernels, where the processor has FMA; elsewhere an ulp of the terms."""
    after, wanted = everything(mine), everything(stock)
    gradients = [p.grad for group in stock.param_groups for p in group["params"]]
    for place, value in wanted.items():
        if not isinstance(value, torch.Tensor):
            continue
        terms = before.get(place, torch.zeros_like(value)).abs()
        if value.dim():
            terms = torch.maximum(terms, gradients[place[0]].abs())
        assert_within_ulps(after[place], value, terms, f"{what}, {place}", 2 if case.exact else 8)
        if case.exact and HAS_FMA and value.numel() > 1:
            whole = value.numel() // LANES * LANES
            assert torch.equal(after[place].view(-1)[:whole], value.view(-1)[:whole]), f"{what}, {place}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_200_updates_from_identical_state_equal_torchs(case):
    ours, theirs = parameters(), parameters()
    mine, stock = case.ours(ours), case.theirs(theirs)
    for step in range(200):
        before = everything(stock)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        stock.step()
        assert_as_stated(case, mine, stock, before, f"step {step}")
        take_over(mine, stock)


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=str)
def test_fp64_is_computed_in_fp64(case):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    mine, stock = case.ours(ours), case.theirs(theirs)
    for step in range(5):
        before = everything(stock)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        stock.step()
        assert_as_stated(case, mine, stock, before, f"step {step}")
        take_over(mine, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=str)
def test_half_precision_is_computed_in_fp32_and_rounded_once(case, dtype):
    ours, wide = parameters(dtype), parameters()
    mine, exact = case.ours(ours), case.ours(wide)
    for step in range(5):
        give_gradients(ours, step)
        with torch.no_grad():
            for a, b in zip(ours, wide):
                b.copy_(a)
                b.grad = a.grad.float()
                for key, value in mine.state[a].items():
                    exact.state[b][key] = value.float().clone()
        mine.step()
        exact.step()
        after = everything(mine)
        for place, value in everything(exact).items():
            assert torch.equal(after[place], value.to(after[place].dtype)), f"step {step}, {place}"


def lars(p, g, b, s):
    norm_p, norm_g = p.norm(), g.norm()
    rate = s["lr"]
    if norm_p > 0 and norm_g > 0:
        rate = rate * s["trust"] * norm_p / (norm_g + s["weight_decay"] * norm_p)
    g = g + s["weight_decay"] * p + s["l1"] * p.sign()
    b = g if b is None else s["momentum"] * b + g
    return p - rate * b, b


def lamb(p, g, m, v, t, s):
    b1, b2 = s["betas"]
    g = g + s["l1"] * p.sign()
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + s["eps"]) + s["weight_decay"] * p
    quotient = p.norm() / r.norm() if p.norm() > 0 and r.norm() > 0 else 1.0
    return p - s["lr"] * quotient * r, m, v


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
@pytest.mark.parametrize("l1", [0.0, 0.01])
def test_lars_and_lamb_follow_their_papers_in_fp64(name, l1):
    ours = parameters(torch.float64)
    with torch.no_grad():
        ours[1].zero_()
    exact = [p.detach().clone() for p in ours]
    optimizer = make(name, ours, lr=0.1, weight_decay=0.05, l1=l1)
    settings = optimizer.param_groups[0]
    state = [(None,) if name == "LARS" else (torch.zeros_like(p), torch.zeros_like(p)) for p in exact]
    for step in range(200):
        give_gradients(ours, step)
        for i, p in enumerate(ours):
            if name == "LARS":
                exact[i], *state[i] = lars(exact[i], p.grad, *state[i], settings)
            else:
                exact[i], *state[i] = lamb(exact[i], p.grad, *state[i], step + 1, settings)
        optimizer.step()
        for p, wanted in zip(ours, exact):
            # 1e-12: two hundred roundings in fp64, and no term of the formula is that small.
            assert torch.allclose(p, wanted, rtol=1e-12, atol=1e-12), f"step {step}"


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
@pytest.mark.parametrize("size", [1e-22, 1.0, 1e22])
def test_norms_of_lars_and_lamb_are_of_fp64_whatever_the_size(name, size):
    # Squares of 1e22 overflow float32, those of 1e-22 underflow.
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(size * torch.randn(1 << 16, generator=generator))
    p.grad = torch.randn(1 << 16, generator=generator)
    before = p.detach().double()
    extra = {"trust": 1.0} if name == "LARS" else {"eps": 1e-30, "weight_decay": 0.0}
    optimizer = make(name, [p], lr=0.5, **extra)
    optimizer.step()
    assert optimizer.skipped == 0
    moved = before - p.detach().double()
    assert float(moved.norm()) == pytest.approx(0.5 * float(before.norm()), rel=1e-6)
    direction = p.grad.double() if name == "LARS" else p.grad.double().sign()
    assert moved @ direction > (1 - 1e-9) * moved.norm() * direction.norm()
