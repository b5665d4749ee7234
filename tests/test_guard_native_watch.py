"""What a native step was proven for is looked at again at each step; what it does not know goes the general way."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from guard_native_cases import batch, everything, general, same, trained
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP, FusedLinear


def test_settings_of_a_loss_module_are_read_at_each_step():
    step = trained("sgd", "weighted cross_entropy")
    changes = [
        lambda loss: setattr(loss, "label_smoothing", 0.5),
        lambda loss: loss.weight.mul_(3.0),
        lambda loss: setattr(loss, "weight", torch.ones(5)),
        lambda loss: setattr(loss, "reduction", "sum"),
        lambda loss: setattr(loss, "ignore_index", 0),
    ]
    for index, change in enumerate(changes):
        change(step._native.loss)
        twin = general(step)
        results = []
        for each in (step, twin):
            torch.manual_seed(index)
            results.append(each(*batch("cross_entropy", index)))
        assert step.path == "native"
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)


def test_a_parameter_may_be_swapped_after_a_native_step():
    step = trained("adam")
    assert step.path == "native"
    weight, other = step.model.layers[0].weight, nn.Parameter(torch.randn(20, 7))
    values = other.detach().clone()
    torch.utils.swap_tensors(weight, other)
    del other
    assert torch.equal(weight, values)
    twin = general(step)
    for each in (step, twin):
        torch.manual_seed(0)
        each(*batch("cross_entropy", 0))
    assert step.path == "native"
    for a, b in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_a_native_step_never_keeps_are_there_for_a_hook():
    step = trained("adam")
    step(*batch("cross_entropy", 0))
    assert step.path == "native"
    assert all(parameter.grad is None for parameter in step.model.parameters())
    seen = []
    bias = step.model.layers[0].bias
    bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    step(*batch("cross_entropy", 1))
    assert step.path == "general"
    assert seen[0].shape == bias.shape


def with_hook(step):
    step.model.layers[0].register_forward_hook(lambda *_: None)


def with_gradient_hook(step):
    step.model.layers[0].weight.register_hook(lambda grad: grad)


def frozen(step):
    step.model.layers[0].weight.requires_grad_(False)


def with_maximize(step):
    step.optimizer.param_groups[0]["maximize"] = True


def with_optimizer_hook(step):
    step.optimizer.register_step_post_hook(lambda *_: None)


def with_another_memory(step):
    weight = step.model.layers[0].weight
    weight.data = weight.data.t().contiguous().t()


def with_a_forward_of_its_own(step):
    original = step.model.layers[0].forward
    step.model.layers[0].forward = lambda x, **options: original(x, **options)


REASONS = {
    with_another_memory: "not contiguous",
    with_a_forward_of_its_own: "replaced",
    with_hook: "hook",
    with_gradient_hook: "gradient hook",
    frozen: "frozen",
    with_maximize: "settings",
    with_optimizer_hook: "hooks or settings",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_the_native_way_does_not_know_goes_the_general_way(change):
    step = trained("adam")
    change(step)
    step(*batch("cross_entropy", 0))
    assert step.path == "general"
    assert REASONS[change] in step.path_reason


def test_a_weight_that_two_layers_share_is_updated_once():
    torch.manual_seed(0)
    model = MLP(7, (7, 7), 5)
    model.layers[1].weight = model.layers[0].weight
    step = TrainStep(model, "cross_entropy", torch.optim.Adam(model.parameters(), 1e-2))
    for index in range(3):
        step(*batch("cross_entropy", index))
    assert step.path == "general"
    assert "share" in step.path_reason
    assert {int(entries["step"]) for entries in step.optimizer.state.values()} == {3}


def test_parts_that_are_never_native_say_why():
    stock = nn.Sequential(nn.Linear(7, 5))
    plain = MLP(7, (8,), 5)
    weighted = nn.CrossEntropyLoss(weight=torch.ones(5, dtype=torch.float64))
    rows = [
        (stock, "cross_entropy", torch.optim.SGD, {}, "not an nn.MLP"),
        (plain, lambda z, t: nn.functional.cross_entropy(z, t), torch.optim.SGD, {}, "loss"),
        (plain.double(), weighted, torch.optim.SGD, {}, "float32"),
        (MLP(7, (8,), 5), "cross_entropy", torch.optim.Adagrad, {}, "Adagrad"),
        (MLP(7, (8,), 5), "cross_entropy", torch.optim.SGD, {"accumulate": 2}, "accumulated"),
    ]
    for model, loss, optimizer, options, reason in rows:
        step = TrainStep(model, loss, optimizer(model.parameters(), 0.1), **options)
        x, target = batch("cross_entropy", 0)
        step(x.to(model.layers[0].weight.dtype) if isinstance(model, MLP) else x, target)
        assert step.path == "general"
        assert reason in step.path_reason


class Other(MLP):
    def forward(self, x, **options):
        return super().forward(x, **options) * 0


class Nothing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def rebind_layers(step):
    layers = step.model.layers
    step.model.layers = nn.ModuleList([layers[0], FusedLinear(20, 9, activation="gelu"), layers[2]])


def drop_in_the_last_layer(step):
    step.model.layers[-1].dropout = 0.5


def own_buffer(step):
    step.model.register_buffer("own", torch.zeros(1))


def another_class(step):
    step.model.__class__ = Other


def own_optimizer_step(step):
    step.optimizer.step = lambda: None


def coupled_decay_made_decoupled(step):
    step.optimizer.param_groups[0]["decoupled_weight_decay"] = True


def accumulator_hook(step):
    weight = step.model.layers[0].weight
    step.kept = weight.view_as(weight).grad_fn.next_functions[0][0]
    step.kept.register_prehook(lambda grads: grads)


def state_of_inference(step):
    state = step.optimizer.state[step.model.layers[0].weight]
    with torch.inference_mode():
        state["exp_avg"] = state["exp_avg"].clone()


CHANGES = [
    own_buffer,
    another_class,
    own_optimizer_step,
    coupled_decay_made_decoupled,
    accumulator_hook,
    state_of_inference,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_steps_is_noticed(change):
    step = trained("adam")
    assert step.path == "native"
    change(step)
    with contextlib.suppress(RuntimeError):  # what torch itself refuses
        step(*batch("cross_entropy", 0))
    assert step.path == "general", change


@pytest.mark.parametrize("change", [rebind_layers, drop_in_the_last_layer], ids=lambda change: change.__name__)
def test_a_changed_network_is_the_one_that_is_trained(change):
    step = trained("sgd")
    change(step)
    optimizer = torch.optim.SGD(step.model.parameters(), 0.1)
    step = TrainStep(step.model, "cross_entropy", optimizer)
    step(*batch("cross_entropy", 0))
    change(step)
    step.model.eval()
    x, target = batch("cross_entropy", 1)
    expected = nn.functional.cross_entropy(step.model(x), target).item()
    with contextlib.suppress(ValueError):  # the optimizer does not know the new layer
        assert step(x, target).loss == pytest.approx(expected, rel=1e-5)


def test_layers_that_do_not_fit_are_the_general_ways_error():
    for wrong in (3, 3000):
        model = MLP(7, (20,), 5)
        model.layers[0] = FusedLinear(7, wrong)
        step = TrainStep(model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1))
        with pytest.raises(ValueError, match="features"):
            step(*batch("cross_entropy", 0))


@pytest.mark.parametrize("rate", [-0.5, 1.5, float("nan")])
def test_a_rate_outside_0_to_1_is_the_general_ways_error(rate):
    step = trained("sgd")
    step.model.layers[0].dropout = rate
    with pytest.raises(ValueError, match="p "):
        step(*batch("cross_entropy", 0))


def test_momentum_that_comes_later_is_used():
    step = trained("sgd")
    twin = general(step)
    for each in (step, twin):
        each.optimizer.param_groups[0]["momentum"] = 0.9
        for seed in range(3):
            torch.manual_seed(seed)
            each(*batch("cross_entropy", seed))
    for a, b in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_integer_beyond_double_changes_nothing():
    step = trained("sgd")
    before = everything(step)
    step.optimizer.param_groups[0]["lr"] = 10**400
    with pytest.raises((OverflowError, ValueError, RuntimeError)):
        step(*batch("cross_entropy", 0))
    assert same(before, everything(step))


def test_hooks_and_modes_of_others_see_the_general_way():
    step = trained("sgd")
    handle = module_hooks.register_module_forward_hook(lambda *_: None)
    try:
        step(*batch("cross_entropy", 0))
        assert step.path == "general"
    finally:
        handle.remove()
    with Nothing():
        step(*batch("cross_entropy", 0))
        assert step.path == "general"
    with torch.device("cpu"):
        step(*batch("cross_entropy", 0))
        assert step.path == "native"


def test_a_reduction_changed_in_a_partial_is_used():
    loss = functools.partial(nn.functional.cross_entropy, reduction="mean")
    model = MLP(7, (8,), 5)
    step = TrainStep(model, loss, torch.optim.SGD(model.parameters(), 1e-3))
    mean = step(*batch("cross_entropy", 0)).loss
    loss.keywords["reduction"] = "sum"
    assert step(*batch("cross_entropy", 0)).loss > 10 * mean
    assert step.path == "native"


def test_class_weights_moved_to_less_memory_are_not_read_beyond_it():
    model, weights = MLP(7, (8,), 5), torch.ones(5)
    loss = nn.CrossEntropyLoss(weights)
    step = TrainStep(model, loss, torch.optim.SGD(model.parameters(), 0.1))
    step(*batch("cross_entropy", 0))
    assert step.path == "native"
    loss.weight.data = weights[:2]
    with pytest.raises(RuntimeError, match="weight"):
        step(*batch("cross_entropy", 0))


def test_an_infinite_output_of_an_ignored_row_skips_the_step():
    torch.manual_seed(0)
    model = MLP(7, (), 5)
    step = TrainStep(model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1))
    x, target = batch("cross_entropy", 0)
    x[3], target[3] = x[3].sign() * 3e38, -100
    model.layers[0].weight.data *= 30
    assert step(x, target).skipped


def test_more_layers_than_the_native_step_takes_go_the_general_way():
    model = MLP(7, (4,) * 64, 5)
    step = TrainStep(model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1))
    step(*batch("cross_entropy", 0))
    assert step.path == "general"
    assert "too many" in step.path_reason


def test_a_model_that_holds_its_own_step_is_freed():
    model = MLP(7, (8,), 5)
    step = TrainStep(model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1))
    step(*batch("cross_entropy", 0))
    assert step.path == "native"
    model.__dict__["trainer"] = step
    gone = weakref.ref(model)
    del model, step
    gc.collect()
    assert gone() is None
