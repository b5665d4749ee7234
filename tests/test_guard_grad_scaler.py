"""guard.GradScaler: all that torch.amp.GradScaler does, and a bad step leaves no trace."""

import copy
import math
import pickle
import warnings
import weakref

import pytest
import torch
from closeness import assert_within_ulps
from guard_runs import OPTIMIZERS, all_finite, assert_same_bits, poison
from torch import nn

from mlpkit.errors import ArgumentError, DtypeError, NonFiniteError
from mlpkit.guard import GradScaler, History, headroom, optim
from mlpkit.guard.attempt import Attempt
from mlpkit.guard.state import OptimizerCopy
from mlpkit.trace import Tracer

STOCK = torch.amp.GradScaler


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Loop:
    """A training loop as it stands in a thousand scripts; only the scaler's class differs."""

    def __init__(self, kind=GradScaler, optimizer="adamw", clip=None, autocast=True, **options):
        self.model = network()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        if kind is GradScaler:
            options.setdefault("model", self.model)
        self.scaler = kind("cpu", **options)
        self.clip, self.autocast = clip, autocast
        self.data = torch.Generator().manual_seed(7)

    def batch(self):
        return torch.randn(16, 5, generator=self.data), torch.randint(3, (16,), generator=self.data)

    def take(self, x=None, y=None, spoil=None):
        x, y = self.batch() if x is None else (x, y)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=self.autocast):
            loss = nn.functional.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        if spoil:
            spoil(self)
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def state(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])


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


# What torch's own checks of its scaler ask.


def test_tensors_and_nested_iterables_are_scaled_by_the_scale():
    scaler = GradScaler("cpu", init_scale=2.0)
    one = torch.full((1,), 4.0)
    assert scaler.scale(one) == 8.0
    many = (one.clone(), [one.clone(), (one.clone(),)])
    scaled = scaler.scale(many)
    assert type(scaled) is tuple
    assert type(scaled[1]) is list
    assert (scaled[0], scaled[1][0], scaled[1][1][0]) == (8.0, 8.0, 8.0)
    assert [float(value) for value in scaler.scale(one.clone() for _ in range(3))] == [8.0] * 3
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        scaler.scale([3.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unscaling_divides_dense_and_sparse_gradients_and_finds_inf(dtype):
    for sparse in (False, True):
        for bad in (False, True):
            parameter = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
            optimizer = torch.optim.SGD([parameter], lr=1.0)
            scaler = GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            gradient = torch.tensor([[8.0, 0.0], [0.0, torch.inf if bad else 16.0]], dtype=dtype)
            parameter.grad = gradient.to_sparse() if sparse else gradient
            scaler.unscale_(optimizer)
            assert float(parameter.grad.to_dense()[0, 0]) == 2.0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scaler.step(optimizer)
            assert parameter.tolist()[0][0] == (0.0 if bad else -2.0)
            scaler.update()
            assert scaler.get_scale() == (2.0 if bad else 4.0)


def test_half_precision_gradients_are_refused_in_torchs_words_and_complex_ones_in_ours():
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for dtype, error, message in [
        (torch.float16, ValueError, "Attempting to unscale FP16 gradients"),
        (torch.complex64, DtypeError, r"gradient of group 0, parameter 0 \(2,\) is complex"),
    ]:
        parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
        parameter.grad = torch.ones(2, dtype=dtype)
        with pytest.raises(error, match=message):
            scaler.unscale_(torch.optim.SGD([parameter], lr=1.0))


def test_calls_out_of_order_are_refused_in_torchs_words():
    loop = Loop()
    with pytest.raises(AssertionError, match="Attempted step but _scale is None"):
        loop.scaler.step(loop.optimizer)
    with pytest.raises(AssertionError, match="Attempted update but _scale is None"):
        loop.scaler.update()
    loop.scaler.scale(loop.model(torch.randn(4, 5)).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        loop.scaler.update()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        loop.scaler.step(loop.optimizer, closure=lambda: None)
    loop.scaler.unscale_(loop.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        loop.scaler.unscale_(loop.optimizer)
    loop.scaler.step(loop.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        loop.scaler.unscale_(loop.optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        loop.scaler.step(loop.optimizer)
    with pytest.raises(AssertionError, match="only be pickled at the beginning"):
        pickle.dumps(loop.scaler)
    loop.scaler.update()
    empty = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        loop.scaler.step(empty)
    with pytest.raises(AssertionError, match="The growth factor must be > 1"):
        GradScaler("cpu", growth_factor=1.0)
    with pytest.raises(AssertionError, match="The backoff factor must be < 1"):
        GradScaler("cpu", backoff_factor=1.0)


def test_disabled_it_changes_nothing():
    loop = Loop(enabled=False)
    with torch.no_grad():
        loop.model[0].weight[0, 0] = torch.nan
    loss = torch.ones(())
    assert loop.scaler.scale(loss) is loss
    loop.take()
    assert loop.scaler.get_scale() == 1.0
    assert loop.scaler.state_dict() == {}
    assert not loop.scaler.is_enabled()
    assert not loop.model._forward_pre_hooks
    assert loop.scaler.steps == 0


def test_getters_setters_and_a_new_scale():
    scaler, stock = GradScaler("cpu"), STOCK("cpu")
    for one in (scaler, stock):
        one.set_growth_factor(3.0)
        one.set_backoff_factor(0.25)
        one.set_growth_interval(7)
        one.scale(torch.ones(()))
        one.update(128.0)
        assert one.get_scale() == 128.0
        one.update(torch.tensor(64.0))
        assert (one.get_growth_factor(), one.get_backoff_factor(), one.get_growth_interval()) == (3.0, 0.25, 7)
    assert scaler.state_dict() == stock.state_dict()
    with pytest.raises(AssertionError, match="new_scale should be a float or a 1-element"):
        scaler.update(torch.ones(2))
    with pytest.raises(ArgumentError, match=r"update: new_scale is 0\.0"):
        scaler.update(0.0)
    scaler.update(2.0**-20)  # asked for: the floor gives way
    assert scaler.get_scale() == 2.0**-20


@pytest.mark.parametrize("lazy", [False, True])
def test_state_goes_to_torchs_scaler_and_back(lazy):
    ours, stock = Loop(growth_interval=5, init_scale=256.0), Loop(STOCK)
    for _ in range(3):
        ours.take()
    if not lazy:
        stock.take()
    stock.scaler.load_state_dict(ours.scaler.state_dict())
    assert stock.scaler.state_dict() == ours.scaler.state_dict()
    again = GradScaler("cpu")
    again.load_state_dict(stock.scaler.state_dict())
    assert again.state_dict() == ours.scaler.state_dict()
    assert again._get_growth_tracker() == 3
    with pytest.raises(RuntimeError, match="source state dict is empty"):
        again.load_state_dict({})
    for bad in (0.0, 1e-321, torch.inf):
        with pytest.raises(ArgumentError, match="load_state_dict: scale is"):
            again.load_state_dict({**stock.scaler.state_dict(), "scale": bad})


def test_a_pickled_or_copied_scaler_goes_on_and_takes_a_model_again():
    loop = Loop(growth_interval=2)
    loop.take()
    for make in (lambda scaler: pickle.loads(pickle.dumps(scaler)), copy.deepcopy):
        again = make(loop.scaler)
        assert again.state_dict() == loop.scaler.state_dict()
        again.protect(loop.model)
        loop.scaler = again
        loop.take()
    assert again.get_scale() == 2 * 65536.0
    twin = copy.deepcopy(loop.model)  # an averaged copy, say: its forwards are no business of the scaler's
    twin(torch.randn(4, 5))
    assert not loop.scaler._gate.open
    pickle.loads(pickle.dumps(loop.model))(torch.randn(4, 5))


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


def test_policies_of_the_scaler_act_in_update():
    loop = Loop(on_nonfinite="raise")
    with pytest.raises(NonFiniteError, match=r"gradient of 3\.bias holds 3 NaN") as caught:
        loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    assert caught.value.records == loop.scaler.records
    loop.take()
    loop = Loop(on_collapse="raise")
    loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    x, y = loop.batch()
    with pytest.raises(NonFiniteError, match="The forward itself held it"):
        loop.take(x * 3e5, y)
    loop = Loop(max_consecutive_skips=2)
    loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"2 steps in a row were skipped \(max_consecutive_skips=2\)"):
        loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.nan))


def test_bad_state_and_settings_are_errors_that_name_them():
    loop = Loop()
    loop.take()
    loop.optimizer.param_groups[0]["lr"] = torch.nan
    before = loop.state()
    with pytest.raises(ArgumentError, match="GradScaler: lr of parameter group 0 is nan"):
        loop.take()
    assert_same_bits(loop.model[3].state_dict(), copy.deepcopy(loop.model[3]).state_dict())
    loop.optimizer.param_groups[0]["lr"] = 0.01
    loop = Loop()
    loop.take()
    loop.optimizer.state[loop.model[3].bias]["exp_avg"][1] = torch.nan
    before = loop.state()
    with pytest.raises(NonFiniteError, match=r"optimizer state 'exp_avg of 3\.bias' held 1 NaN before the step"):
        loop.take()
    assert_same_bits(loop.state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "init_scale is 0.0"),
        ({"init_scale": torch.nan}, "init_scale is nan"),
        ({"init_scale": 1e-40}, "init_scale is 1e-40; it and its reciprocal"),
        ({"growth_factor": torch.nan}, "growth_factor is nan"),
        ({"backoff_factor": 0.0}, "backoff_factor is 0.0"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"floor": -1.0}, "floor is -1.0"),
        ({"ceiling": torch.inf}, "ceiling is inf"),
        ({"floor": 8.0, "ceiling": 4.0}, r"floor is 8\.0; it must be at most the ceiling, 4\.0"),
        ({"model": 3}, "model is int"),
        ({"device": 1024.0}, "device is 1024.0"),
        ({"on_nonfinite": "rollback"}, "'rollback' is TrainStep's"),
        ({"on_collapse": "fp32_step"}, "'fp32_step' is TrainStep's"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips is 0"),
        ({"check_every": 0}, "check_every is 0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(options, message):
    with pytest.raises(ArgumentError, match=message):
        GradScaler(**{"device": "cpu", **options})


def test_history_headroom_and_the_tracers_word_on_where_it_began():
    history = History()
    loop = Loop(history=history, init_scale=1024.0)
    loop.take()
    largest = max(float(p.grad.abs().max()) for p in loop.model.parameters()) * 1024.0
    bits = min(loop.scaler.headroom.values())
    assert bits == pytest.approx(float(torch.tensor(65504.0 / largest).log2()), abs=1e-3)
    with Tracer(loop.model):
        loop.take()
        x, y = loop.batch()
        loop.take(x * 3e5, y)
    record = loop.scaler.records[0]
    assert (record.module, record.op, record.cause) == ("0", "_to_copy", "cast_overflow")
    rows = history.rows()
    assert [row["skipped"] for row in rows] == [False, False, True]
    assert rows[0]["headroom"] == bits
    assert rows[0]["grad_norm"] > 0


def test_gradients_that_no_kernel_counts_may_be_empty_or_lie_on_several_devices(monkeypatch):
    monkeypatch.setattr(headroom, "_COUNTED", ())  # as on a device
    gradients = [torch.tensor([1.0, -3.0]), torch.zeros(0), torch.tensor([torch.inf]), torch.tensor([torch.nan])]
    assert headroom.absmax(gradients).tolist() == [3.0, 0.0, torch.inf, torch.inf]
    left_out = headroom.absmax([None, torch.zeros(0, 3)])
    assert math.isnan(left_out[0])
    assert left_out[1] == 0
    assert headroom.absmax([torch.ones(2, device="meta"), torch.ones(2)]).device.type == "meta"
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    attempt = Attempt(optimizer, optimizer.step, {}, OptimizerCopy(optimizer))
    attempt._norms = [torch.ones(2, device="meta"), torch.ones(2)]
    assert attempt.norm.device.type == "meta"


def test_the_scale_that_is_told_without_reading_is_the_scale(monkeypatch):
    # As on a device, where the scale is read only when it may have moved.
    monkeypatch.setattr(GradScaler, "_on_cpu", False)
    loop = Loop(growth_interval=3, init_scale=256.0)
    nan, none = (lambda loop: loop.model[3].bias.grad.fill_(torch.nan)), None
    for index, spoil in enumerate([none, none, nan, none, none, none, none, none, none, none]):
        if index == 5:
            x, y = loop.batch()
            loop.take(x * torch.nan, y)  # holds the scale and its tracker
        loop.take(spoil=spoil)
        assert loop.scaler._known == float(loop.scaler._scale)
        assert loop.scaler._clean_steps == int(loop.scaler._growth_tracker)
    assert [change.after for change in loop.scaler.scale_changes] == [128.0, 256.0, 512.0]
    loop.scaler.load_state_dict(loop.scaler.state_dict())
    loop.take()
    assert loop.scaler._known == float(loop.scaler._scale)


def test_our_own_optimizers_are_updated_by_one_native_call_and_guarded_as_any_other():
    loop, stock = Loop(clip=None), Loop(STOCK)
    loop.optimizer = optim.Adam(loop.model.parameters(), lr=0.01)
    stock.optimizer = torch.optim.Adam(stock.model.parameters(), lr=0.01, fused=True)
    for _ in range(4):
        before = copy.deepcopy(stock.model.state_dict())
        loop.take()
        stock.take()
        for name, parameter in loop.model.named_parameters():
            assert_within_ulps(parameter.detach(), stock.model.state_dict()[name], before[name], name, ulps=8)
    assert loop.scaler._optimizers[loop.optimizer].fused.prepared
    before = loop.state()
    loop.take(spoil=lambda loop: loop.model[3].bias.grad.fill_(torch.inf))
    loop.take(spoil=lambda loop: loop.model[3].weight.grad.fill_(1e27))
    x, y = loop.batch()
    loop.take(x * torch.nan, y)
    assert_same_bits(loop.state(), before)
    assert [(record.where, record.culprit) for record in loop.scaler.records] == [
        ("gradient", "3.bias"),
        ("update", "exp_avg_sq of 3.weight"),
        ("inputs", "inputs"),
    ]
    loop.take()
    assert len(loop.scaler.records) == 3
