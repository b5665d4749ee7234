"""guard.optim in loops: torch's scaler, state dicts, threads, hooks, schedulers, copies and bad arguments."""

import copy
import math
import pickle

import pytest
import torch
from closeness import assert_within_ulps
from guarded_update_cases import CASES, OPTIMIZERS, assert_same, everything, give_gradients, make, parameters
from torch import nn

from mlpkit.errors import ArgumentError, DtypeError
from mlpkit.guard import GradScaler, TrainStep, optim
from mlpkit.guard.update import DeviceScale, why_not

NAN = math.nan


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
