"""guard.optim: torch's updates, whole or not at all, with state that either side takes."""

import copy
import math
import pickle

import pytest
import torch
from closeness import assert_within_ulps
from guarded_update_cases import CASES, OPTIMIZERS, assert_same, everything, give_gradients, parameters, take_over
from torch import nn

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DtypeError
from mlpkit.guard import GradScaler, TrainStep, optim
from mlpkit.guard.update import DeviceScale, why_not
from mlpkit.ops.guarded_update import ScaleRule

HAS_FMA, LANES = _C.cpu_capability() != "default", 16
INF, NAN = math.inf, math.nan


def make(name, targets, **settings):
    if name in ("SGD", "LARS", "RMSprop"):
        settings = {"momentum": 0.9, **settings}
    return getattr(optim, name)(targets, **settings)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [INF, -INF, NAN])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_bad_gradient_skips_the_whole_step(name, kind, steps):
    ours = parameters()
    optimizer = make(name, ours, clip_norm=1.0)
    for step in range(steps):
        give_gradients(ours, step)
        optimizer.step()
    before = everything(optimizer)
    give_gradients(ours, 7)
    ours[3].grad[4, 1, 0] = kind
    optimizer.step()
    assert_same(before, everything(optimizer))
    (record,) = optimizer.records
    assert (record.step, record.where, record.first_index) == (steps, "gradient", 26)
    assert record.culprit == "group 0, parameter 3 (5, 3, 2)"
    assert record.kind == ("NaN" if math.isnan(kind) else "Inf")
    give_gradients(ours, 8)
    optimizer.step()
    assert len(optimizer.records) == 1
    assert any(not torch.equal(before[i, "p"], p) for i, p in enumerate(ours))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_a_twin_that_never_saw_it(name):
    ours, twins = parameters(), parameters()
    optimizer, twin = make(name, ours), make(name, twins)
    for step in range(6):
        if step in (0, 3):
            give_gradients(ours, 50 + step)
            ours[0].grad[2, 2] = NAN
            optimizer.step()
        give_gradients(ours, step)
        give_gradients(twins, step)
        optimizer.step()
        twin.step()
        assert_same(everything(twin), everything(optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_update_that_would_overflow_skips_the_step(name, dtype):
    ours = parameters(dtype)
    optimizer = make(name, ours)
    give_gradients(ours, 0, 0.1)
    optimizer.step()
    with torch.no_grad():
        ours[5].fill_(torch.finfo(dtype).max)
    optimizer.param_groups[0].update(lr=-1.0 if dtype == torch.float32 else -0.5, weight_decay=1.0)
    give_gradients(ours, 1, 0.1)
    before = everything(optimizer)
    optimizer.step()
    assert_same(before, everything(optimizer))
    assert [(record.where, record.culprit) for record in optimizer.records] == [
        ("update", "group 0, parameter 5 (129,)")
    ]


def test_an_overflow_is_seen_whatever_touched_the_state():
    ours = parameters()
    optimizer = optim.Adam(ours)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    optimizer.state[ours[0]]["exp_avg"].fill_(1e38)
    optimizer.state[ours[0]]["exp_avg_sq"].zero_()
    before = everything(optimizer)
    optimizer.step()
    assert_same(before, everything(optimizer))
    assert optimizer.records[0].where == "update"


def test_huge_gradients_are_clipped():
    ours, twins = parameters(), parameters()
    optimizer, twin = optim.SGD(ours, lr=0.1, clip_norm=1.0), optim.SGD(twins, lr=0.1, clip_norm=1.0)
    give_gradients(ours, 0, 2.0**66)
    give_gradients(twins, 0, 2.0**10)
    optimizer.step()
    twin.step()
    assert optimizer.grad_norm > 1e20
    assert_same(everything(twin), everything(optimizer))
    huge = parameters(torch.float64)
    optimizer = optim.SGD(huge, lr=0.1, clip_norm=1.0)
    before = everything(optimizer)
    give_gradients(huge, 0)
    for p in huge:
        p.grad *= 1e200
    optimizer.step()
    moved = math.sqrt(sum((before[i, "p"] - p).square().sum().item() for i, p in enumerate(huge)))
    assert optimizer.skipped == 0
    assert abs(moved - 0.1) < 1e-12


def test_clipping_is_that_of_one_norm_over_all_groups():
    ours = parameters()
    optimizer = optim.SGD([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.2}], lr=0.1, clip_norm=0.5)
    theirs = parameters()
    stock = torch.optim.SGD([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.2}], lr=0.1)
    give_gradients(ours)
    give_gradients(theirs)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    optimizer.step()
    stock.step()
    assert abs(optimizer.grad_norm - norm.item()) < 1e-4
    for a, b in zip(ours, theirs):
        # torch divides by norm + 1e-6 and rounds the clipped gradient.
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_scale_divides_moves_and_is_checked():
    ours, twins = parameters(), parameters()
    optimizer, twin = optim.AdamW(ours), optim.AdamW(twins)
    scale = DeviceScale(1024.0, ScaleRule(interval=2))
    for step in range(4):
        give_gradients(ours, step, float(scale.value))
        give_gradients(twins, step)
        optimizer.step(scale=scale)
        twin.step()
        assert_same(everything(twin), everything(optimizer))
    assert float(scale.value) == 4096.0
    give_gradients(ours, 9)
    ours[0].grad[0, 0] = INF
    optimizer.step(scale=scale)
    assert (float(scale.value), int(scale.clean_steps)) == (2048.0, 0)
    for wrong in (0.0, -1.0, INF, NAN, 1e-42):
        scale.value.fill_(wrong)
        before = everything(optimizer)
        give_gradients(ours, 10)
        optimizer.step(scale=scale)
        assert_same(before, everything(optimizer))
        assert "reciprocal" in optimizer.records[-1].note


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_torchs_scaler_works_with_them(name):
    ours = parameters()
    optimizer = make(name, ours, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        x = torch.full((3,), NAN if step == 2 else 1.0 + step)
        loss = sum((p.float() * x.sum()).square().sum() for p in ours)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = everything(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_same(before, everything(optimizer))
    assert scaler.get_scale() == 128.0
    assert optimizer.skipped == 1
    twins = parameters()
    twin = make(name, twins, lr=0.01)
    for step in (0, 1, 3):
        twin.zero_grad()
        sum((p * torch.full((3,), 1.0 + step).sum()).square().sum() for p in twins).backward()
        twin.step()
    for a, b in zip(ours, twins):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_dicts_go_both_ways(case):
    ours, theirs = parameters(), parameters()
    mine, stock = case.ours(ours), case.theirs(theirs)
    for step in range(3):
        give_gradients(ours, step)
        mine.step()
    stock.load_state_dict(pickle.loads(pickle.dumps(mine.state_dict())))
    saved, loaded = mine.state_dict(), stock.state_dict()
    assert saved["state"].keys() == loaded["state"].keys()
    for index, entries in loaded["state"].items():
        assert entries.keys() == saved["state"][index].keys()
    with torch.no_grad():
        for a, b in zip(theirs, ours):
            a.copy_(b)
    give_gradients(theirs, 3)
    stock.step()
    again = parameters()
    other = case.ours(again, l1=0.5)
    other.load_state_dict(copy.deepcopy(stock.state_dict()))
    assert other.param_groups[0]["l1"] == 0.0  # as the first of ours had it
    with torch.no_grad():
        for a, b in zip(again, theirs):
            a.copy_(b)
    give_gradients(again, 4)
    give_gradients(theirs, 4)
    before = everything(stock)
    other.step()
    stock.step()
    for place, value in everything(stock).items():
        if isinstance(value, torch.Tensor):
            assert_within_ulps(everything(other)[place], value, before[place], str(place), 8)


def test_a_state_dict_of_torchs_own_has_no_l1():
    theirs, ours = parameters(), parameters()
    stock, mine = torch.optim.Adam(theirs), optim.Adam(ours, l1=0.25)
    mine.load_state_dict(stock.state_dict())
    assert mine.param_groups[0]["l1"] == 0.25


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threads_change_no_bit(name):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            ours = parameters(shapes=[(400, 501), (7,), (100_003,)])
            optimizer = make(name, ours, clip_norm=0.3)
            for step in range(2):
                give_gradients(ours, step)
                optimizer.step()
            found.append((everything(optimizer), optimizer.grad_norm))
        finally:
            torch.set_num_threads(1)
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_l1_adds_its_subgradient():
    ours, twins = parameters(), parameters()
    with torch.no_grad():
        ours[1][3] = twins[1][3] = 0.0
    optimizer, twin = optim.Adam(ours, l1=0.1), optim.Adam(twins)
    give_gradients(ours)
    give_gradients(twins)
    for p in twins:
        p.grad += 0.1 * p.detach().sign()
    optimizer.step()
    twin.step()
    assert_same(everything(twin), everything(optimizer))


def test_gradients_of_other_strides_and_missing_ones():
    ours, twins = parameters(), parameters()
    optimizer, twin = optim.AdamW(ours), torch.optim.AdamW(twins, fused=True)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(twins, step)
        ours[0].grad = ours[0].grad.t().contiguous().t()
        if step < 2:
            ours[2].grad = twins[2].grad = None
        optimizer.step()
        twin.step()
    for a, b in zip(ours, twins):
        assert_within_ulps(a, b, b, "parameter")


@pytest.mark.parametrize("module", [torch.optim, optim], ids=["torch", "ours"])
@pytest.mark.parametrize("way", ["step", "train step", "scaler"])
def test_hooks_see_what_the_caller_gave_and_gradients_as_they_are(module, way):
    model = nn.Linear(3, 1, bias=False)
    optimizer = module.Adam(model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda _, args, named: seen.append((args, named, model.weight.grad.tolist())))
    optimizer.register_step_post_hook(lambda _, args, named: seen.append((args, named)))
    inputs, target = torch.ones(1, 3), torch.ones(1)
    if way == "train step":
        loss = lambda output, target: (output[0] * target).sum()  # noqa: E731
        step = TrainStep(model, loss, optimizer, precision="fp16", init_scale=1024.0)
        assert not step(inputs, target).skipped
    else:
        scaler = GradScaler("cpu", model=model, enabled=way == "scaler")
        scaler.scale(model(inputs).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert seen == [((optimizer,), {}, [[1.0, 1.0, 1.0]]), ((optimizer,), {})]


def test_hooks_see_a_closure_or_scale_that_was_given():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([parameter])
    seen, scale = [], DeviceScale(1024.0)
    optimizer.register_step_pre_hook(lambda _, args, named: seen.append((args, named)))
    parameter.grad = torch.full((3,), 1024.0)
    optimizer.step(scale=scale)
    optimizer.step(closure := lambda: parameter.sum())
    assert seen == [((optimizer,), {"scale": scale}), ((optimizer, closure), {})]
    assert optimizer.skipped == 0


def test_hooks_closures_and_tensor_rates():
    ours = parameters()
    rate = torch.tensor(0.5)
    optimizer = optim.SGD(ours, lr=rate)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        give_gradients(ours)
        return 3.5

    before = ours[1].detach().clone()
    assert optimizer.step(closure) == 3.5
    assert seen == ["before", "after"]
    assert torch.equal(ours[1], torch.addcmul(before, ours[1].grad, torch.tensor(-0.5)))
    rate.fill_(0.0)
    before = everything(optimizer)
    optimizer.step()
    assert_same(before, everything(optimizer))


def test_a_forced_step_is_a_step_with_all_that_belongs_to_it():
    class Own(optim.SGD):
        def step(self, closure=None):
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    ours = parameters()
    optimizer = Own(ours, lr=0.5)
    assert why_not(optimizer) == "the optimizer's class has a step of its own"
    assert why_not(optim.SGD(ours, lr=0.5)) is None
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    give_gradients(ours)
    ours[1].grad.fill_(NAN)
    assert optimizer.force(lambda: 3.5) == 3.5
    assert (seen, optimizer.calls, optimizer.records) == (["before", "after"], 1, [])
    assert ours[1].isnan().all()
    optimizer.step()
    assert optimizer.skipped == 1


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*")
def test_a_scaler_runs_hooks_and_a_subclass_and_a_scheduler_sees_the_step():
    class Own(optim.Adam):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    for kind in (Own, optim.Adam):
        ours = parameters()
        optimizer = kind(ours, lr=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        seen = []
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        scaler = GradScaler("cpu", model=nn.ParameterList(ours))
        scaler.scale(torch.ones(()))
        give_gradients(ours)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert scaler.records == []
        assert seen == ["after"]
        assert kind is optim.Adam or optimizer.calls == 1


def test_a_scheduler_drives_them_and_copies_go_on():
    ours = parameters()
    optimizer = optim.Adam(ours)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    give_gradients(ours)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4
    other = copy.deepcopy(optimizer)
    twins = other.param_groups[0]["params"]
    for step in (1, 2):
        give_gradients(ours, step)
        give_gradients(twins, step)
        optimizer.step()
        other.step()
    assert_same(everything(optimizer), everything(other))


@pytest.mark.parametrize("setting", ["lr", "weight_decay"])
def test_a_bad_setting_is_named_and_nothing_changes(setting):
    ours = parameters()
    optimizer = optim.AdamW(ours)
    give_gradients(ours)
    optimizer.param_groups[0][setting] = NAN
    before = everything(optimizer)
    with pytest.raises(ArgumentError, match=rf"AdamW: {setting} of parameter group 0 is nan"):
        optimizer.step()
    assert_same(before, everything(optimizer))


def test_arguments_are_checked():
    ours = parameters()
    with pytest.raises(ArgumentError, match=r"clip_norm is 0; it must be a finite number above 0"):
        optim.SGD(ours, clip_norm=0)
    with pytest.raises(ArgumentError, match=r"l1 is -1; it must be a finite number of at least 0"):
        optim.Adam(ours, l1=-1)
    with pytest.raises(ArgumentError, match="differentiable=True is not supported"):
        optim.Adam(ours, differentiable=True)
    with pytest.raises(ArgumentError, match="LARS: trust is -1"):
        optim.LARS(ours, trust=-1)
    with pytest.raises(ArgumentError, match=r"LAMB: betas\[1\] is 1.0"):
        optim.LAMB(ours, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optim.RMSprop(ours, lr=-1)
    with pytest.raises(ArgumentError, match="DeviceScale: init is 0"):
        DeviceScale(0)


def test_gradients_that_cannot_be_taken_are_named():
    complex_one = [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    optimizer = optim.SGD(complex_one)
    complex_one[0].grad = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(DtypeError, match=r"SGD: parameter 0 of group 0, shape \(2,\), is torch.complex64"):
        optimizer.step()
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = optim.AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ArgumentError, match=r"has a torch.sparse_coo gradient; it must be dense"):
        optimizer.step()
    assert not optimizer.state
