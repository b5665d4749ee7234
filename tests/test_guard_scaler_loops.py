"""guard.GradScaler in loops of several optimizers, losses and forwards, and with optimizers that unscale themselves."""

import copy
import weakref

import pytest
import torch
from guard_loop import Loop, network
from guard_runs import assert_same_bits
from torch import nn

from mlpkit.guard import GradScaler


def test_two_optimizers_and_two_losses_share_one_scale():
    first, second = network(), network()
    optimizers = [torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.Adam(second.parameters(), lr=0.1)]
    whole = nn.ModuleList([first, second])
    scaler = GradScaler("cpu", model=whole)
    for bad in (False, True, False):
        before = copy.deepcopy([first.state_dict(), second.state_dict()])
        x = torch.randn(8, 5)
        losses = [first(x).square().mean(), second(x).square().mean()]
        for loss in scaler.scale(losses):
            loss.backward()
        if bad:
            second[3].bias.grad[0] = torch.inf
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(before[i]["0.weight"], m[0].weight) for i, m in enumerate((first, second))]
        assert moved == [True, not bad]
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert [record.culprit for record in scaler.records] == ["1.3.bias"]
    assert scaler.get_scale() == 32768.0


def test_a_bad_forward_is_found_among_several_whatever_arguments_it_took():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.calls = 0

        def forward(self, x, *, gain):
            self.calls += 1
            return self.second(torch.relu(self.first(x)) * gain)

    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", model=model)
    drawn = torch.get_rng_state()
    for gain in (1.0, torch.inf, 2.0):
        scaler.scale(model(torch.ones(2, 3), gain=gain).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.records[0].culprit == "forward of second"
    assert model.calls == 3  # a stand-in was run again, not the model
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_loss_forbids_only_the_step_that_its_backward_fed():
    loop = Loop(autocast=False)
    x, _ = loop.batch()
    loop.scaler.scale(loop.model(x * torch.nan).square().mean())  # seen to be bad, and left alone
    loop.model[1].reset_running_stats()
    loop.take()
    assert loop.scaler.records == []
    first, second = network(), network()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (first, second)]
    scaler = GradScaler("cpu", model=nn.ModuleList([first, second]))
    for model, optimizer, bad in zip((first, second), optimizers, (torch.nan, 1.0)):
        scaler.scale(model(x).square().mean() * bad).backward()
        scaler.step(optimizer)
    scaler.update()
    assert [record.culprit for record in scaler.records] == ["0.0.weight"]
    assert not torch.equal(second[0].weight, network()[0].weight)


def test_a_loss_that_overflowed_skips_the_step_of_finite_gradients_whatever_becomes_of_it():
    loop = Loop(autocast=False)
    before = loop.state()
    x, y = loop.batch()
    loss = nn.functional.cross_entropy(loop.model(x), y) + torch.inf
    loop.scaler.scale(loss).backward()
    loss.detach().zero_()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    assert [(record.where, record.loss) for record in loop.scaler.records] == [("loss", torch.inf)]
    assert_same_bits(loop.state(), before)


def test_accumulated_gradients_keep_the_buffers_of_the_first_forward():
    loop = Loop()
    loop.take()
    before = loop.state()
    x, y = loop.batch()
    loop.optimizer.zero_grad()
    for part in (x, x * 1e30, x):
        loop.scaler.scale(nn.functional.cross_entropy(loop.model(part), y) / 3).backward()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    assert_same_bits(loop.state(), before)


def test_a_validation_forward_and_a_loaded_checkpoint_between_are_not_undone():
    loop = Loop()
    loop.take()
    loop.model.eval()
    loop.model(torch.randn(4, 5))
    loop.model.train()
    assert not loop.scaler._gate.open
    loop.model(torch.randn(4, 5))  # a forward that nobody steps on
    loop.model.load_state_dict({**loop.model.state_dict(), "1.running_mean": torch.full((8,), 5.0)})
    x, y = loop.batch()
    loop.take(x * torch.nan, y)
    assert torch.equal(loop.model[1].running_mean, torch.full((8,), 5.0))


def test_a_checkpoint_loaded_before_a_forward_without_a_graph_is_not_undone():
    loop = Loop()
    loop.model(torch.randn(4, 5))
    loop.model.load_state_dict({**loop.model.state_dict(), "1.running_mean": torch.full((8,), 5.0)})
    loop.model.eval()
    with torch.no_grad():
        loop.model(torch.randn(4, 5))
    loop.model.train()
    x, y = loop.batch()
    loop.take(x * torch.nan, y)
    assert torch.equal(loop.model[1].running_mean, torch.full((8,), 5.0))


def test_a_forward_without_a_graph_leaves_a_spoilt_iterations_buffers_to_be_put_back():
    loop = Loop()
    loop.take()
    before = loop.state()
    x, y = loop.batch()
    loop.optimizer.zero_grad()
    for part in (x * torch.nan, x):
        loop.scaler.scale(nn.functional.cross_entropy(loop.model(part), y)).backward()
        with torch.no_grad():
            loop.model(x)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    assert_same_bits(loop.state(), before)


def test_a_scaler_that_is_gone_leaves_nothing_on_the_model():
    model = network()
    scaler = GradScaler("cpu", model=model)
    batch = torch.randn(4, 5)
    seen = weakref.ref(batch)
    model(batch)
    scaler.protect(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    model(batch)
    del scaler, batch
    assert seen() is None
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_an_optimizer_that_unscales_for_itself_is_asked_as_torch_asks_and_guarded():
    class Own(torch.optim.SGD):
        _step_supports_amp_scaling = True
        seen = ()

        def step(self, closure=None):
            self.seen = (float(self.grad_scale), float(self.found_inf))
            self.param_groups[0]["params"][0].data.add_(torch.inf if self.broken else 1.0)
            return "done"

    loop = Loop()
    loop.optimizer = Own(loop.model.parameters(), lr=0.1)
    loop.optimizer.broken = True
    before = copy.deepcopy(loop.model.state_dict())
    loop.take()
    assert loop.optimizer.seen == (65536.0, 0.0)
    assert_same_bits(loop.model.state_dict(), before)
    assert (loop.scaler.records[0].culprit, loop.scaler.records[0].where) == ("0.weight", "update")
    loop.optimizer.broken = False
    loop.take()
    assert torch.equal(loop.model[0].weight, before["0.weight"] + 1.0)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
@pytest.mark.parametrize("keyword", [False, True])
def test_a_bad_step_of_an_optimizer_that_unscales_for_itself_lowers_the_scale(keyword):
    class Attributes(torch.optim.SGD):
        _step_supports_amp_scaling = True

    class Keyword(Attributes):
        def step(self, closure=None, *, grad_scaler=None):
            grad_scaler.unscale_(self)
            return super().step(closure)

    loop = Loop()
    kind = Keyword if keyword else Attributes
    loop.optimizer = kind(loop.model.parameters(), lr=0.1, fused=not keyword)
    before = loop.state()
    loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    assert_same_bits(loop.state(), before)
    assert loop.scaler.get_scale() == 32768.0
    loop.take()
    assert len(loop.scaler.records) == 1
