"""guard.GradScaler: a bad step leaves no trace, and a good one is torch's bit for bit."""

import copy

import pytest
import torch
from guard_loop import STOCK, Loop, network
from guard_runs import OPTIMIZERS, all_finite, assert_same_bits, poison

from mlpkit.guard import GradScaler


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clean_steps_equal_torchs_bit_for_bit(optimizer, clip):
    ours = Loop(optimizer=optimizer, clip=clip, init_scale=512.0, growth_interval=3)
    stock = Loop(STOCK, optimizer, clip, init_scale=512.0, growth_interval=3)
    for _ in range(7):
        ours.take()
        stock.take()
    assert_same_bits(ours.state(), stock.state())
    assert ours.scaler.state_dict() == stock.scaler.state_dict()
    assert ours.scaler.get_scale() == 2048.0
    assert [(c.before, c.after, c.reason) for c in ours.scaler.scale_changes] == [
        (512.0, 1024.0, "growth"),
        (1024.0, 2048.0, "growth"),
    ]
    assert ours.scaler.records == []


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_and_foreach_optimizers_take_the_same_steps(kind):
    states = []
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        loop = Loop()
        loop.optimizer = kind(loop.model.parameters(), lr=0.01, **options)
        for _ in range(3):
            loop.take()
        before = loop.state()
        x, y = loop.batch()
        loop.take(x * torch.inf, y)
        assert_same_bits(loop.state(), before)
        assert len(loop.scaler.records) == 1
        states.append(loop.model.state_dict())
    assert_same_bits(states[1], states[2])


def test_changing_the_import_alone_protects_and_warns_once_of_buffers():
    loop = Loop(model=None)
    with pytest.warns(UserWarning, match=r"buffers, such as BatchNorm's statistics, are not protected; give model="):
        loop.take()
    parameters = copy.deepcopy([dict(loop.model.named_parameters()), loop.optimizer.state_dict()])
    loop.take(spoil=lambda loop: loop.model[3].weight.grad[1, 2].fill_(torch.inf))
    assert_same_bits([dict(loop.model.named_parameters()), loop.optimizer.state_dict()], parameters)
    record = loop.scaler.records[0]
    assert record.culprit == "group 0, parameter 4 (3, 8)"
    assert (record.where, record.kind, record.count, record.first_index) == ("gradient", "Inf", 1, 10)
    assert record.nature == "calibration"
    assert len(record.absmax) == 2
    assert 0 < record.absmax[0] < 65504
    assert record.absmax[1] == torch.inf
    assert "group 0, parameter 4 (3, 8) holds 1 Inf. The loss scale was 65536." in str(record)
    assert loop.scaler.get_scale() == 32768.0


def test_with_a_model_culprits_have_names_and_buffers_come_back():
    loop = Loop()
    loop.take()
    before = loop.state()
    x, y = loop.batch()
    loop.take(x * 1e30, y)
    assert_same_bits(loop.state(), before)
    record = loop.scaler.records[0]
    assert (record.culprit, record.where, record.nature) == ("forward of 0", "forward", "collapse")
    x, y = loop.batch()
    loop.take(poison(torch.nan)(x), y)
    record = loop.scaler.records[1]
    assert (record.culprit, record.nature, record.count, record.first_index) == ("inputs", "data", 1, 3 * 5 + 2)
    assert loop.scaler.get_scale() == 65536.0  # no scale would have helped
    stock = Loop(STOCK)
    stock.take(x * 1e30, y)
    assert not all_finite(stock.model.state_dict())


def test_statistics_that_alone_went_bad_skip_the_step():
    loop = Loop(autocast=False)
    loop.take()
    before = loop.state()
    x, y = loop.batch()
    loop.take(x * 1e25, y)
    assert (loop.scaler.records[0].where, loop.scaler.records[0].culprit) == ("buffer", "1.running_var")
    assert_same_bits(loop.state(), before)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
def test_an_update_that_would_overflow_is_taken_back_and_leaves_the_scale(optimizer):
    loop = Loop(optimizer=optimizer)
    loop.take()
    before, scaler = loop.state(), loop.scaler.state_dict()
    loop.take(spoil=lambda loop: loop.model[3].weight.grad.fill_(1e27))
    record = loop.scaler.records[0]
    assert (record.where, record.nature) == ("update", "update")
    assert record.culprit.endswith(" of 3.weight")
    assert_same_bits(loop.state(), before)
    assert loop.scaler.state_dict() == scaler


def test_a_norm_that_overflowed_and_clipped_everything_away_is_seen():
    # fp32 squares of 1e20 are Inf, the clip factor is 0, and the step would go nowhere.
    loop = Loop(clip=1.0)
    loop.take()
    before, scaler = loop.state(), loop.scaler.state_dict()
    loop.take(spoil=lambda loop: [p.grad.fill_(1e25) for p in loop.model.parameters()])
    assert (loop.scaler.records[0].where, loop.scaler.records[0].culprit) == ("norm", "gradient norm")
    assert_same_bits(loop.state(), before)
    assert loop.scaler.state_dict() == scaler


def test_a_gradient_that_went_bad_after_unscaling_leaves_the_scale():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", 1024.0, growth_interval=1, model=model)
    scaler.scale(model(torch.randn(4, 5)).sum()).backward()
    scaler.unscale_(optimizer)
    model[0].weight.grad[0, 0] = torch.nan
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.records[0].culprit, scaler.records[0].nature) == ("0.weight", "gradient")
    assert scaler.get_scale() == 1024.0


def test_gradients_that_are_cleared_on_purpose_are_no_fault():
    loop = Loop(clip=1.0)

    def clear(optimizer, *_):
        for parameter in loop.model.parameters():
            parameter.grad.zero_()

    loop.optimizer.register_step_pre_hook(clear)
    loop.take()
    loop.take(spoil=lambda loop: [p.grad.zero_() for p in loop.model.parameters()])
    assert loop.scaler.records == []


def test_inf_that_the_caller_mended_after_unscaling_still_skips_as_torchs_does():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", model=model)
    scaler.scale(model(torch.randn(4, 5)).sum()).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    for parameter in model.parameters():
        parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    before = copy.deepcopy(model[0].weight)
    scaler.step(optimizer)
    assert torch.equal(model[0].weight, before)
    assert scaler.records[0].where == "gradient"


def test_the_scale_stays_between_floor_and_ceiling_and_a_loss_that_is_inf_does_not_lower_it():
    loop = Loop(init_scale=8.0, floor=2.0, ceiling=16.0, growth_interval=1)
    for _ in range(3):
        loop.take()
    assert loop.scaler.get_scale() == 16.0
    for _ in range(6):
        loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    assert loop.scaler.get_scale() == 2.0
    assert [record.nature for record in loop.scaler.records[-4:]] == ["calibration", "gradient", "gradient", "gradient"]
    assert "at its floor" in str(loop.scaler.records[-1])
    x, y = loop.batch()
    loop.take(x * torch.nan, y)
    assert loop.scaler.get_scale() == 2.0
