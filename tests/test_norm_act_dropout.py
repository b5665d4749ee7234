"""norm_act_dropout: right values, right gradients, and running averages that move as PyTorch's."""

import itertools

import pytest
import torch
from norm_act_dropout_cases import SHAPES, Case, assert_close
from torch import nn

from mlpkit.functional import linear_act_dropout, norm_act_dropout
from mlpkit.reference import ACTIVATIONS, dropout_mask
from mlpkit.reference import norm_act_dropout as stock

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = [None, "batch", "layer"]
LAYOUTS = ["transposed", "sliced", "leading", "misaligned"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_gradients_err_no_more_than_stock(norm, activation, dtype, cpu_capability):
    case = Case(norm=norm, activation=activation, slopes=int(activation == "prelu"))
    assert_close(norm_act_dropout, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_ragged_shapes_err_no_more_than_stock(norm, shape, dtype, cpu_capability):
    for activation in ("relu", "gelu"):
        assert_close(norm_act_dropout, Case(*shape, norm, activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_running_averages_err_no_more_than_stock(activation, dtype, cpu_capability):
    assert_close(norm_act_dropout, Case(70, 129, "batch", activation, fixed=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_no_weight_every_p_and_slopes_by_column_err_no_more_than_stock(norm, dtype):
    for p, activation in itertools.product((0.0, 0.9, 1.0), ("relu", "prelu", "tanh")):
        slopes = 129 if activation == "prelu" else 0
        assert_close(norm_act_dropout, Case(40, 129, norm, activation, p, affine=False, slopes=slopes), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_mean_far_from_zero_and_many_numbers_err_no_more_than_stock(norm, dtype, cpu_capability):
    assert_close(norm_act_dropout, Case(2000, 40, norm, "identity", offset=30.0), dtype)
    assert_close(norm_act_dropout, Case(40, 2000, norm, "identity", offset=30.0), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_any_strides_and_leading_dimensions_err_no_more_than_stock(norm, layout):
    assert_close(norm_act_dropout, Case(129, 70, norm, "gelu", layout=layout), torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "prelu by feature"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck_holds_in_fp64(norm, activation, p):
    features = 5
    z = torch.randn(2, 3, features, dtype=torch.float64, requires_grad=True)
    leaves = [torch.randn(features, dtype=torch.float64, requires_grad=True) for _ in range(2 if norm else 0)]
    slopes = [torch.rand(features if activation.endswith("feature") else 1, dtype=torch.float64, requires_grad=True)]

    def run(z, *others):
        slope = others[-1] if activation.startswith("prelu") else None
        affine = others[:2] if norm else ()
        return norm_act_dropout(z, norm, *affine, activation=activation.split()[0], slope=slope, p=p, seed=5)

    assert torch.autograd.gradcheck(run, (z, *leaves, *(slopes if activation.startswith("prelu") else [])))


def test_gradcheck_holds_with_running_averages():
    z, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(6, 5), (5,), (5,)])
    averages = {"running_mean": torch.randn(5).double(), "running_var": torch.rand(5).double() + 0.5}

    def run(z, weight, bias):
        return norm_act_dropout(
            z, "batch", weight, bias, **averages, activation="tanh", p=0.4, seed=1, frozen=True, training=True
        )

    assert torch.autograd.gradcheck(run, (z, weight, bias))


@pytest.mark.parametrize("norm", NORMS)
def test_the_mask_is_that_of_the_contract(norm):
    z = torch.randn(70, 45, dtype=torch.float64)
    keep, scale = dropout_mask(70, 45, 0.3, 12345, 6, 3)
    options = {"activation": "identity", "training": True}
    plain = norm_act_dropout(z, norm, p=0.0, **options)
    y = norm_act_dropout(z, norm, p=0.3, seed=torch.tensor([12345, 6]), stream=3, **options)
    torch.testing.assert_close(y, plain * keep * scale)


def test_without_a_norm_it_is_the_rest_of_a_linear_layer():
    x, weight = torch.randn(40, 8), torch.randn(33, 8)
    z = linear_act_dropout(x, weight, activation="identity")
    for activation in ("relu", "gelu", "leaky_relu"):
        y = norm_act_dropout(z, None, activation=activation, p=0.3, seed=4, stream=2)
        assert torch.equal(y, linear_act_dropout(x, weight, activation=activation, p=0.3, seed=4, stream=2))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_averages_move_as_those_of_pytorch(momentum):
    z = torch.randn(9, 4, 5, dtype=torch.float64) * 3 + 2
    ours, theirs = (
        {"running_mean": torch.zeros(5, dtype=torch.float64), "running_var": torch.ones(5, dtype=torch.float64)}
        for _ in range(2)
    )
    for _ in range(3):
        norm_act_dropout(z, "batch", **ours, momentum=momentum)
        stock(z, "batch", **theirs, momentum=momentum)
    torch.testing.assert_close(ours, theirs)
    moved = {name: tensor.clone() for name, tensor in ours.items()}
    y = norm_act_dropout(z, "batch", **ours, training=False)
    norm_act_dropout(z, "batch", **ours, frozen=True)
    torch.testing.assert_close(ours, moved, rtol=0, atol=0)
    torch.testing.assert_close(y, stock(z, "batch", **theirs, training=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_parameters_of_float32_beside_16_bits_keep_their_dtype(norm, dtype):
    z = torch.randn(12, 5).to(dtype).requires_grad_()
    weight, bias, slope = (torch.ones(5, requires_grad=True) for _ in range(3))
    y = norm_act_dropout(z, norm, weight, bias, activation="prelu", slope=slope)
    y.sum().backward()
    assert (y.dtype, z.grad.dtype) == (dtype, dtype)
    assert {tensor.grad.dtype for tensor in (weight, bias, slope)} == {torch.float32}


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_it_is_what_the_modules_of_pytorch_give(norm):
    module = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[norm](6).double()
    z = torch.randn(11, 6, dtype=torch.float64)
    y = norm_act_dropout(z, norm, module.weight, module.bias, activation="gelu", eps=module.eps)
    torch.testing.assert_close(y, nn.functional.gelu(module(z)))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("norm", NORMS)
def test_empty_inputs_give_empty_outputs_and_zero_gradients(norm, shape):
    z = torch.ones(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True) if norm else None
    averages = {"running_mean": torch.ones(shape[-1]), "running_var": torch.ones(shape[-1])} if norm == "batch" else {}
    y = norm_act_dropout(z, norm, weight, **averages, p=0.5, seed=0)
    assert y.shape == z.shape
    y.sum().backward()
    assert z.grad.shape == z.shape
    assert weight is None or not weight.grad.any()
    assert all(torch.equal(tensor, torch.ones(shape[-1])) for tensor in averages.values())


def test_a_single_row_has_layer_norm_and_running_averages():
    z = torch.randn(5)
    torch.testing.assert_close(norm_act_dropout(z, "layer", activation="identity"), nn.functional.layer_norm(z, (5,)))
    averages = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    y = norm_act_dropout(z, "batch", **averages, training=False, activation="identity", eps=0.0)
    assert torch.equal(y, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 64), (777, 515), (5, 2048)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_threads_and_repetition_change_no_bit(norm, shape, dtype, cpu_capability):
    case = Case(*shape, norm, "gelu")
    data = case.data(0, dtype)
    first = case.run(norm_act_dropout, data, 0)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = case.run(norm_act_dropout, data, 0)
        for name, result in first.items():
            assert torch.equal(result, again[name]), f"{name} differs with {threads} threads"


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_only_the_gradients_asked_for_are_given_and_they_are_the_same(norm):
    case = Case(33, 17, norm, "prelu", slopes=17)
    data = case.data(0, torch.float32)
    names = ["z", "weight", "bias", "slope"]
    complete = case.run(norm_act_dropout, data, 0)
    for count in range(1, len(names)):
        for asked in itertools.combinations(names, count):
            leaves = {name: data[name].detach().requires_grad_(name in asked) for name in names}
            slope = leaves.pop("slope")
            words = torch.tensor([0, 2])
            y = norm_act_dropout(
                leaves["z"], norm, leaves["weight"], leaves["bias"], activation="prelu", slope=slope, p=0.3,
                seed=words, stream=1,
            )  # fmt: skip
            y.backward(data["dy"])
            for name, leaf in (leaves | {"slope": slope}).items():
                assert (leaf.grad is not None) == (name in asked)
                assert leaf.grad is None or torch.equal(leaf.grad, complete[f"gradient of {name}"])


def test_inputs_are_left_as_they_were():
    data = Case(33, 17).data(0, torch.float32)
    before = {name: tensor.clone() for name, tensor in data.items()}
    Case(33, 17).run(norm_act_dropout, data, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in data.items())
