"""mlpkit.nn: FusedLinear is a linear layer with an activation and dropout, MLP a network of them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mlpkit import reference
from mlpkit.errors import ArgumentError
from mlpkit.nn import ACTIVATIONS, MLP, FusedLinear

NORMS = (None, "batch", "layer")


def rows(count=12, features=7, dtype=torch.float64):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(5), dtype=dtype)


def test_the_activations_are_those_of_the_op():
    assert ACTIVATIONS == reference.ACTIVATIONS


def test_a_new_layer_holds_the_numbers_of_a_new_linear_layer():
    torch.manual_seed(4)
    ours = FusedLinear(7, 5)
    torch.manual_seed(4)
    stock = nn.Linear(7, 5)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_a_layer_and_a_linear_layer_load_each_others_state():
    ours, stock = FusedLinear(7, 5, activation="identity").double(), nn.Linear(7, 5).double()
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(rows()), stock(rows()))
    other = nn.Linear(7, 5, bias=False)
    other.load_state_dict(FusedLinear(7, 5, bias=False).state_dict())


def test_only_a_learnable_slope_adds_to_the_state():
    assert list(FusedLinear(2, 3, activation="prelu").state_dict()) == ["weight", "bias", "slope"]
    assert list(FusedLinear(2, 3, activation="leaky_relu", slope=0.2).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_its_stock_modules_in_value_and_gradient(activation, bias):
    layer = FusedLinear(7, 5, bias, activation=activation, dropout=0.5, dtype=torch.float64).eval()
    stock = layer.to_sequential()
    x = rows()
    torch.testing.assert_close(layer(x), stock(x))
    layer(x).square().sum().backward()
    stock(x).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("slope", [0.3, torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5])])
def test_a_prelu_slope_starts_where_it_is_told(slope):
    layer = FusedLinear(7, 5, activation="prelu", slope=slope, dtype=torch.float64)
    expected = reference.linear_act_dropout(
        rows(), layer.weight, layer.bias, activation="prelu", slope=torch.as_tensor(slope).double().reshape(-1)
    )
    torch.testing.assert_close(layer(rows()), expected)
    assert isinstance(layer.slope, nn.Parameter)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_network_equals_its_sequential(activation, norm):
    model = MLP(7, (9, 4), 3, activation=activation, dropout=(0.1, 0.2), norm=norm, dtype=torch.float64)
    model(rows())  # moves the running statistics of a batch norm away from 0 and 1
    stock = model.eval().to_sequential()
    assert not stock.training
    assert all(type(part).__module__.startswith("torch.nn") for part in stock)
    torch.testing.assert_close(model(rows()), stock(rows()))


@pytest.mark.parametrize("norm", NORMS)
def test_without_dropout_the_sequential_trains_to_the_same_gradients(norm):
    model = MLP(7, (9, 4), 3, activation="gelu", norm=norm, dtype=torch.float64)
    stock = model.to_sequential()
    model(rows()).square().sum().backward()
    stock(rows()).square().sum().backward()
    ours = sorted((p.grad for p in model.parameters()), key=lambda gradient: gradient.norm())
    theirs = sorted((p.grad for p in stock.parameters()), key=lambda gradient: gradient.norm())
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (1, 7)])
def test_leading_dimensions_are_rows(norm, shape):
    model = MLP(7, (9,), 3, norm=norm).eval()
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), model(x.reshape(-1, 7)).reshape(*shape[:-1], 3))


def test_no_hidden_layer_is_a_linear_model():
    model = MLP(7, (), 3, dtype=torch.float64)
    expected = nn.functional.linear(rows(), model.layers[0].weight, model.layers[0].bias)
    torch.testing.assert_close(model(rows()), expected)
    assert len(list(model.parameters())) == 2


def test_the_last_layer_is_linear_and_drops_nothing():
    last = MLP(7, (9,), 3, activation="tanh", dropout=0.5).layers[-1]
    assert (last.activation, last.dropout) == ("identity", 0.0)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_layer_that_feeds_a_norm_has_no_bias_and_the_norm_comes_before_the_activation(norm):
    model = MLP(7, (9, 4), 3, norm=norm, activation="relu", dropout=0.5)
    assert [layer.bias is None for layer in model.layers] == [True, True, False]
    kinds = [type(part).__name__ for part in model.to_sequential()]
    name = {"batch": "BatchNorm1d", "layer": "LayerNorm"}[norm]
    assert kinds == ["Linear", name, "ReLU", "Dropout"] * 2 + ["Linear"]
    assert all(layer.bias is None for layer in MLP(7, (9,), 3, bias=False).layers)


def test_a_given_seed_makes_the_masks_of_the_contract_with_one_stream_per_layer():
    model = MLP(7, (33, 20), 3, activation="tanh", dropout=(0.5, 0.25), dtype=torch.float64)
    seed = torch.tensor([12345, 6])
    y = rows(40)
    for stream, layer in enumerate(model.layers):
        y = reference.linear_act_dropout(
            y, layer.weight, layer.bias, activation=layer.activation, p=layer.dropout, seed=seed, stream=stream
        )
    torch.testing.assert_close(model(rows(40), seed=seed), y)


def test_layers_of_one_width_drop_different_units():
    model = MLP(16, (16, 16), 16, activation="identity", dropout=0.5, bias=False)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.copy_(torch.eye(16))
    # Through identities both masks show: with equal ones half would survive, with independent ones a quarter.
    alive = (model(torch.ones(512, 16)) != 0).double().mean().item()
    assert 0.2 < alive < 0.3


def test_manual_seed_repeats_a_forward_and_every_forward_drops_anew():
    model, x = MLP(7, (64,), 3, dropout=0.5), rows(dtype=torch.float32)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("draws", [True, False])
def test_one_seed_is_drawn_per_forward_and_none_without_dropout(draws):
    model = MLP(7, (8, 8, 8), 3, dropout=0.5 if draws else 0.0)
    torch.manual_seed(1)
    model(rows(dtype=torch.float32))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    if draws:
        torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    assert torch.equal(torch.get_rng_state(), after)
    MLP.eval(model)(rows(dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("norm", NORMS)
def test_copies_pickles_and_loaded_states_give_the_same_outputs(norm):
    model = MLP(7, (9, 4), 3, activation="prelu", dropout=0.3, norm=norm)
    model(rows(dtype=torch.float32))
    other = MLP(7, (9, 4), 3, activation="prelu", dropout=0.3, norm=norm)
    other.load_state_dict(model.state_dict())
    expected = model.eval()(rows(dtype=torch.float32))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other.eval()):
        assert torch.equal(twin(rows(dtype=torch.float32)), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_a_network_can_be_made_half_and_double(norm):
    model = MLP(7, (9,), 3, activation="prelu", norm=norm).half()
    assert {value.dtype for value in model.parameters()} == {torch.float16}
    assert model(rows(dtype=torch.float16)).dtype == torch.float16
    assert model.to(torch.float64)(rows()).dtype == torch.float64


@pytest.mark.parametrize("norm", NORMS)
def test_a_network_compiles_into_one_graph(norm):
    torch.compiler.reset()
    model = MLP(7, (9, 4), 3, activation="silu", dropout=0.5, norm=norm)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = rows(dtype=torch.float32)
    torch.manual_seed(2)
    expected = model(x)
    torch.manual_seed(2)
    result = compiled(x)
    assert torch.equal(result, expected)
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_network_follows_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert MLP(7, (9,), 3, dropout=0.1)(rows(dtype=torch.float32)).dtype == torch.bfloat16


def test_repr_names_what_is_not_the_default():
    assert repr(FusedLinear(4, 3)) == "FusedLinear(4, 3, activation=relu)"
    layer = FusedLinear(4, 3, False, activation="leaky_relu", dropout=0.25, slope=0.2)
    assert repr(layer) == "FusedLinear(4, 3, activation=leaky_relu, dropout=0.25, slope=0.2, bias=False)"
    assert "(1): FusedLinear(8, 2, activation=identity)" in repr(MLP(4, (8,), 2))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 3), {}, "in_features is 0; it must be an int of at least 1"),
        ((4, 2.5), {}, "out_features is 2.5; it must be an int"),
        ((4, 3), {"activation": "swish"}, "activation is 'swish'; it must be one of identity, relu, leaky_relu"),
        ((4, 3), {"dropout": 1.5}, r"dropout is 1.5; it must be a probability in \[0, 1\]"),
        ((4, 3), {"dropout": float("nan")}, "dropout is nan"),
        ((4, 3), {"slope": 0.1}, "slope is 0.1; only leaky_relu and prelu have one, not relu"),
        (
            (4, 3),
            {"activation": "leaky_relu", "slope": float("inf")},
            "slope is inf; for leaky_relu it must be",
        ),
        (
            (4, 3),
            {"activation": "prelu", "slope": torch.ones(2)},
            r"slope is a tensor of shape \(2,\); for prelu",
        ),
    ],
)
def test_a_wrong_argument_of_a_layer_is_named(arguments, options, message):
    with pytest.raises(ArgumentError, match=f"FusedLinear: {message}"):
        FusedLinear(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, (8, 0), 2), {}, r"hidden\[1\] is 0; it must be an int of at least 1"),
        ((4, 8, 2), {}, "hidden is 8; it must be widths such as"),
        ((4, (8,), -1), {}, "out_features is -1"),
        ((4, (8,), 2), {"activation": "swish"}, "activation is 'swish'"),
        ((4, (8,), 2), {"norm": "instance"}, "norm is 'instance'; it must be one of batch, layer, None"),
        (
            (4, (8, 8), 2),
            {"dropout": (0.1,)},
            r"dropout is \(0.1,\); it must be a number or one per",
        ),
        ((4, (8, 8), 2), {"dropout": (0.1, 2)}, r"dropout\[1\] is 2"),
    ],
)
def test_a_wrong_argument_of_a_network_is_named(arguments, options, message):
    with pytest.raises(ArgumentError, match=f"MLP: {message}"):
        MLP(*arguments, **options)


def test_an_unknown_initialiser_is_refused_with_the_list():
    with pytest.raises(ArgumentError, match="the name is 'ones'; it must be one of xavier_uniform, xavier_normal"):
        MLP(4, (8,), 2, init="ones")
