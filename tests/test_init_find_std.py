"""init.find_std: the weights go down by halves until the first step is finite, and nothing else moves."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpkit import init
from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.nn import MLP


def batch(rows=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, 20, generator=generator, dtype=dtype), torch.randint(0, 5, (rows,), generator=generator)


def large(factor, **options):
    model = MLP(20, (30, 30), 5, **options)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(factor)
    return model


def is_finite(model, pair, loss, dtype=None):
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        value = loss(model(pair[0]), pair[1])
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return bool(value.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_good_weights_stay_bit_for_bit():
    model = large(1)
    before = copy.deepcopy(model.state_dict())
    found = init.find_std(model, batch(), F.cross_entropy)
    assert (found.factor, len(found.tries)) == (1.0, 1)
    assert found.loss == F.cross_entropy(model(batch()[0]), batch()[1]).item()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "dtype", "factor"), [("fp32", None, 1e14), ("fp16", torch.float16, 1e3)])
def test_the_first_finite_power_of_two_is_found_and_left_in_the_model(precision, dtype, factor):
    model = large(factor)
    before = copy.deepcopy(model)
    assert not is_finite(model, batch(), F.cross_entropy, dtype)
    found = init.find_std(model, batch(), F.cross_entropy, precision)
    assert found.factor < 1
    assert math.log2(found.factor).is_integer()
    for index, layer in enumerate(model.layers):
        assert torch.equal(layer.weight, before.layers[index].weight * found.factor)
        assert torch.equal(layer.bias, before.layers[index].bias)
        assert found.std[f"layers.{index}"] == pytest.approx(layer.weight.std(correction=0).item(), rel=1e-5)
    assert is_finite(model, batch(), F.cross_entropy, dtype)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(2)
    assert not is_finite(model, batch(), F.cross_entropy, dtype), "a larger start would have done"


def test_gradients_count_and_the_fault_names_the_parameter():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return torch.where(x.abs().max() > 1, gradient * math.inf, gradient)

    model = large(8.0)
    found = init.find_std(model, batch(), lambda output, target: Steep.apply(output).square().mean())
    assert found.factor < 1
    assert found.tries[0].fault == "the gradient of layers.0.weight is not finite"
    assert math.isfinite(found.tries[0].loss)


def test_mode_buffers_gradients_and_random_state_stay():
    model = large(1e30, norm="batch", dropout=0.5)
    model(batch()[0]).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    init.find_std(model, batch(), F.cross_entropy)
    assert all(torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(model.parameters(), gradients))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.buffers(), buffers))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_shared_weight_is_lowered_once():
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    with torch.no_grad():
        model[0].weight.mul_(1e22)
    model[2].weight = model[0].weight
    start = model[0].weight.detach().clone()
    found = init.find_std(model, (batch()[0], batch()[1]), F.cross_entropy)
    assert found.factor < 1
    assert list(found.std) == ["0"]
    assert torch.equal(model[0].weight, start * found.factor)


def test_what_was_found_prints():
    lines = str(init.find_std(large(1e14), batch(), F.cross_entropy)).splitlines()
    assert lines[0].startswith("init.find_std in fp32: weights times ")
    assert lines[1].startswith("  times 1: the loss is ")
    assert lines[-1].startswith("  layers.2: std ")


def test_what_weights_cannot_help_is_refused_and_they_stay():
    model = large(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"the loss is nan with weights times 5.42\d*e-20 too"):
        init.find_std(model, batch(), lambda output, target: output.sum() * math.nan)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(NonFiniteError, match="input 0 holds Inf or NaN to begin with"):
        init.find_std(model, (torch.full((2, 20), math.nan), torch.zeros(2).long()), F.cross_entropy)
    with torch.no_grad():
        model.layers[1].bias[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.bias holds Inf or NaN to begin with"):
        init.find_std(model, batch(), F.cross_entropy)


@pytest.mark.parametrize(
    ("model", "pair", "loss", "precision", "message"),
    [
        (MLP(20, (3,), 5), batch(), F.cross_entropy, "fp8", "precision is 'fp8'; it must be one of fp32, fp16, bf16"),
        (MLP(20, (3,), 5), batch()[0], F.cross_entropy, "fp32", r"batch is Tensor; it must be a pair"),
        (MLP(20, (3,), 5), batch(), lambda y, t: y, "fp32", "loss gave Tensor; it must be a tensor of one element"),
        (nn.ReLU(), batch(), F.cross_entropy, "fp32", "ReLU has no linear or convolution layer"),
    ],
)
def test_wrong_arguments_are_named(model, pair, loss, precision, message):
    with pytest.raises(ArgumentError, match=f"init.find_std: {message}"):
        init.find_std(model, pair, loss, precision)


def test_losses_have_the_names_of_the_guarded_step():
    by_name, by_function = large(2.0**40), large(2.0**40)
    by_function.load_state_dict(by_name.state_dict())
    found = init.find_std(by_name, batch(), "cross_entropy", "fp16")
    assert found.factor < 1
    assert found.factor == init.find_std(by_function, batch(), F.cross_entropy, "fp16").factor
    with pytest.raises(ArgumentError, match=r"init\.find_std: loss is 'hinge'; it must be one of cross_entropy, bce"):
        init.find_std(by_name, batch(), "hinge")
