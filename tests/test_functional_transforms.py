"""The functions under torch.func: gradients, per-sample gradients, ensembles, forward mode, second derivatives."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

from mlpkit import nn, reference
from mlpkit.errors import ArgumentError, ShapeError
from mlpkit.functional import linear_act_dropout, mlp, norm_act_dropout

DOUBLE = torch.float64


def tensors(seed=0):
    torch.manual_seed(seed)
    return torch.randn(19, 7, dtype=DOUBLE), torch.randn(33, 7, dtype=DOUBLE), torch.randn(33, dtype=DOUBLE)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_a_gradient_under_functorch_is_the_op_s_with_its_mask(activation):
    x, weight, bias = tensors()
    slope = torch.full((33,), 0.2, dtype=DOUBLE) if activation == "prelu" else None

    def loss(weight):
        y = linear_act_dropout(x, weight, bias, activation=activation, slope=slope, p=0.4, seed=2**63 + 5, stream=3)
        return y.square().sum()

    eager = weight.clone().requires_grad_()
    loss(eager).backward()
    torch.testing.assert_close(grad(loss)(weight), eager.grad)


def test_p_of_1_and_of_0_are_what_the_op_gives():
    x, weight, _ = tensors()
    for p in (0.0, 1.0):
        y = vmap(lambda w, p=p: linear_act_dropout(x, w, p=p, seed=1))(weight[None])[0]
        torch.testing.assert_close(y, linear_act_dropout(x, weight, p=p, seed=1))


def test_seeds_mapped_over_give_the_mask_of_each():
    x, weight, _ = tensors()
    seeds = torch.tensor([[3, 0], [-4, 2**40 + 9], [2**62, 1]])
    mapped = vmap(lambda seed: linear_act_dropout(x, weight, activation="identity", p=0.5, seed=seed))(seeds)
    for one, seed in zip(mapped, seeds, strict=True):
        keep, _ = reference.dropout_mask(19, 33, 0.5, *seed.tolist())
        assert torch.equal(one != 0, keep)


def test_drawn_masks_obey_the_randomness_of_vmap():
    x, weight, _ = tensors()

    def drop(x):
        return linear_act_dropout(x, weight, activation="identity", p=0.5) == 0

    batch = x.expand(4, 19, 7)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(batch)
    assert (vmap(drop, randomness="same")(batch) == vmap(drop, randomness="same")(batch)[0]).float().mean() > 0.4
    same, different = (vmap(drop, randomness=kind)(batch) for kind in ("same", "different"))
    assert torch.equal(same, same[:1].expand_as(same))
    assert not torch.equal(different[0], different[1])
    assert 0.35 < different.double().mean() < 0.65


@pytest.mark.parametrize("norm", [None, "layer"])
def test_per_sample_gradients_of_a_network_are_those_of_each_sample_alone(norm):
    torch.manual_seed(1)
    model = nn.MLP(5, (9, 6), 2, activation="gelu", norm=norm).to(DOUBLE)
    x, parameters = torch.randn(4, 5, dtype=DOUBLE), dict(model.named_parameters())

    def loss(parameters, row):
        return functional_call(model, parameters, (row[None],)).square().sum()

    mapped = vmap(grad(loss), (None, 0))(parameters, x)
    for row in range(4):
        model.zero_grad()
        loss(parameters, x[row]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(mapped[name][row], parameter.grad)


def test_an_ensemble_of_stacked_models_gives_what_each_gives():
    torch.manual_seed(2)
    models = [nn.MLP(5, (8,), 3, activation="prelu", norm="batch").to(DOUBLE).eval() for _ in range(3)]
    x, base = torch.randn(6, 5, dtype=DOUBLE), copy.deepcopy(models[0]).to("meta")
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(*stack_module_state(models))
    for model, output in zip(models, outputs, strict=True):
        torch.testing.assert_close(output, model(x))


def test_batch_norm_moves_its_averages_under_grad_as_the_op_does():
    torch.manual_seed(3)
    z = torch.randn(17, 4, dtype=DOUBLE)
    ours, theirs = ([torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)] for _ in range(2))

    def loss(z, averages):
        y = norm_act_dropout(z, "batch", running_mean=averages[0], running_var=averages[1], p=0.3, seed=4)
        return y.square().sum()

    gradient = grad(lambda z: loss(z, ours))(z)
    eager = z.clone().requires_grad_()
    loss(eager, theirs).backward()
    torch.testing.assert_close(gradient, eager.grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_and_second_derivatives_are_stock_pytorch_s():
    x, weight, bias = tensors()
    direction = torch.randn_like(weight)

    def ours(weight):
        return linear_act_dropout(x, weight, bias, activation="tanh", p=0.2, seed=6)

    def stock(weight):
        return reference.linear_act_dropout(x, weight, bias, activation="tanh", p=0.2, seed=6)

    value, tangent = jvp(ours, (weight,), (direction,))
    torch.testing.assert_close(value, ours(weight))
    step = 1e-6
    difference = (stock(weight + step * direction) - stock(weight - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)
    small = weight[:2, :3]
    second = hessian(lambda w: linear_act_dropout(x[:, :3], w, activation="silu").sum())(small)
    exact = torch.autograd.functional.hessian(
        lambda w: reference.linear_act_dropout(x[:, :3], w, activation="silu").sum(), small
    )
    torch.testing.assert_close(second, exact)


def test_networks_of_no_hidden_layer_and_of_leaky_ones_do_too():
    x, weight, bias = tensors()
    torch.testing.assert_close(grad(lambda w: mlp(x, [w], [bias]).sum())(weight), x.sum(0).expand(33, 7))
    last = torch.randn(2, 33, dtype=DOUBLE)

    def loss(weight):
        return mlp(x, [weight, last], activation="leaky_relu", slope=0.3, p=0.5, seed=7).square().sum()

    eager = weight.clone().requires_grad_()
    loss(eager).backward()
    torch.testing.assert_close(grad(loss)(weight), eager.grad)


def test_errors_name_the_argument_under_transforms_too():
    x, weight, _ = tensors()
    with pytest.raises(ShapeError, match="x has 6 features"):
        grad(lambda w: linear_act_dropout(x[:, :6], w).sum())(weight)
    with pytest.raises(ArgumentError, match="activation is 'cube'"):
        grad(lambda w: mlp(x, [w, w.T], activation="cube").sum())(weight)
