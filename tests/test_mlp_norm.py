"""functional.mlp and nn.MLP with norms: one autograd node, bit for bit the layers one by one, masks of the contract."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from mlpkit import reference
from mlpkit.errors import ArgumentError, ShapeError
from mlpkit.functional import linear_act_dropout, mlp, norm_act_dropout
from mlpkit.nn import MLP

ACTIVATIONS = ["identity", "relu", "leaky_relu", "prelu", "gelu", "silu"]
WIDTHS = (20, 33, 17, 5)
NORMS = ["batch", "layer"]


def network(activation="relu", dtype=torch.float32):
    """x and the lists of a ragged network, all with gradients; and running averages."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*size):
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    hidden = WIDTHS[1:-1]
    lists = {
        "weights": [leaf(out, inner) for inner, out in pairwise(WIDTHS)],
        "biases": [leaf(WIDTHS[1]), None, leaf(WIDTHS[-1])],
        "norm_weights": [leaf(hidden[0]), None],
        "norm_biases": [leaf(width) for width in hidden],
    }
    if activation == "prelu":
        lists["slope"] = [leaf(1), leaf(hidden[1])]
    averages = {
        "running_means": [torch.zeros(width) for width in hidden],
        "running_vars": [torch.ones(width) for width in hidden],
    }
    if dtype == torch.float64:
        averages = {name: [tensor.double() for tensor in tensors] for name, tensors in averages.items()}
    return leaf(40, WIDTHS[0]), lists, averages


def one_by_one(x, lists, averages, *, norm, activation, slope, p, seed, frozen=False):
    weights = lists["weights"]
    for layer, (weight, bias) in enumerate(zip(weights, lists["biases"], strict=True)):
        x = linear_act_dropout(x, weight, bias, activation="identity")
        if layer < len(weights) - 1:
            own = slope[layer] if isinstance(slope, list) else slope
            running = {}
            if averages:
                pairs = zip(("running_mean", "running_var"), averages.values(), strict=True)
                running = {name: tensors[layer] for name, tensors in pairs}
            affine = (lists["norm_weights"][layer], lists["norm_biases"][layer])
            x = norm_act_dropout(
                x, norm, *affine, **running, activation=activation, slope=own, p=p[layer], seed=seed, stream=layer,
                frozen=frozen,
            )  # fmt: skip
    return x


def leaves(x, lists):
    return [x, *(tensor for tensors in lists.values() for tensor in tensors if tensor is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_values_gradients_and_averages_are_those_of_the_layers_one_by_one(norm, activation, dtype):
    x, lists, averages = network(activation, dtype)
    averages = averages if norm == "batch" else {}
    twins = copy.deepcopy(averages)
    slope = lists.get("slope", 0.2 if activation == "leaky_relu" else None)
    options = {"norm": norm, "activation": activation, "slope": slope, "p": [0.3, 0.5], "seed": 7}
    arguments = {name: tensors for name, tensors in lists.items() if name.startswith("norm")}
    for frozen in (False, norm == "batch"):
        ours = mlp(x, lists["weights"], lists["biases"], **arguments, **averages, **options, frozen=frozen)
        layers = one_by_one(x, lists, twins, **options, frozen=frozen)
        assert torch.equal(ours, layers)
        torch.testing.assert_close(averages, twins, rtol=0, atol=0)
        dy = torch.randn_like(ours)
        inputs = leaves(x, lists)
        for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(layers, inputs, dy), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_gradients_asked_for_are_given(norm):
    x, lists, _ = network("prelu")
    inputs = leaves(x, lists)
    names = ("weights", "biases", "norm_weights", "norm_biases", "slope")
    complete = None
    for asked in (None, *range(len(inputs))):
        copies = [t.detach().clone().requires_grad_(asked is None or i == asked) for i, t in enumerate(inputs)]
        rest = iter(copies[1:])
        own = {name: [t if t is None else next(rest) for t in lists[name]] for name in names}
        mlp(copies[0], own.pop("weights"), own.pop("biases"), **own, norm=norm, activation="prelu", p=0.3, seed=1)\
            .square().sum().backward()  # fmt: skip
        complete = complete or [t.grad for t in copies]
        for i, tensor in enumerate(copies):
            assert (tensor.grad is not None) == (asked in (None, i))
            assert tensor.grad is None or torch.equal(tensor.grad, complete[i])


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_agree_with_finite_differences(norm):
    x, lists, _ = network("tanh", torch.float64)
    flat = leaves(x, lists)

    def function(x, w0, w1, w2, b0, b2, nw, nb0, nb1):
        affine = {"norm_weights": [nw, None], "norm_biases": [nb0, nb1]}
        return mlp(x, [w0, w1, w2], [b0, None, b2], activation="tanh", p=0.4, seed=5, norm=norm, **affine)

    assert torch.autograd.gradcheck(function, tuple(flat))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_compiled_values_gradients_and_averages_are_the_eager_ones(norm):
    x, lists, averages = network()
    averages = averages if norm == "batch" else {}
    twins = copy.deepcopy(averages)

    def function(averages, x, *weights):
        return mlp(x, weights, activation="gelu", p=0.5, seed=3, norm=norm, **averages)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weights = lists["weights"]
    ours, eager = compiled(averages, x, *weights), function(twins, x, *weights)
    assert torch.equal(ours, eager)
    torch.testing.assert_close(averages, twins)
    for a, b in zip(torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(eager.sum(), weights), strict=True):
        assert torch.equal(a, b)


def test_the_dispatched_op_is_lawful():
    x, lists, _ = network(dtype=torch.float64)
    none = [None, None]
    rest = (torch.tensor([1, 2]), "batch", 1e-5, "gelu", 0.01, [0.2, 0.3])
    arguments = (x, lists["weights"], [None] * 3, none, none, none, none, none, *rest)
    torch.library.opcheck(torch.ops.mlpkit.mlp_norm.default, arguments, test_utils=("test_schema", "test_faketensor"))


REFUSALS = {
    "too few weights": (ArgumentError, "norm_weights has 1 entries", {"norm_weights": [None]}),
    "an unknown norm": (ArgumentError, "layer 0: .*'instance'", {"norm": "instance"}),
    "a weight that does not fit": (ShapeError, "layer 1: .*weight.*17", {"norm_weights": [None, torch.ones(3)]}),
    "averages that do not fit": (
        ShapeError,
        "layer 0: .*running_mean",
        {"running_means": [torch.ones(3), torch.ones(17)], "running_vars": [torch.ones(3), torch.ones(17)]},
    ),
    "no averages": (ArgumentError, "layer 0: .*running_mean is None", {"training": False}),
    "one row": (ShapeError, "layer 0: .*Expected more than 1 value per channel", {"rows": 1}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(name):
    error, message, options = REFUSALS[name]
    x, lists, _ = network()
    arguments = {"norm": "batch"} | options
    with pytest.raises(error, match=message):
        mlp(x[: arguments.pop("rows", 40)], lists["weights"], **arguments)


def rows(count=40, features=7, dtype=torch.float64):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(5), dtype=dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_a_network_s_masks_are_those_of_the_contract(norm):
    model = MLP(7, (33, 20), 3, activation="tanh", dropout=(0.5, 0.25), norm=norm, dtype=torch.float64)
    seed = torch.tensor([12345, 6])
    y = rows()
    for stream, block in enumerate(model.blocks):
        z = nn.functional.linear(y, model.layers[stream].weight)
        y = reference.norm_act_dropout(
            z, norm, block[0].weight, block[0].bias, activation="tanh", p=block[2].p, seed=seed, stream=stream
        )
    y = nn.functional.linear(y, model.layers[-1].weight, model.layers[-1].bias)
    torch.testing.assert_close(model(rows(), seed=seed), y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu"])
def test_a_watched_network_computes_the_same_bits(activation, norm):
    models = [MLP(7, (9, 4), 3, activation=activation, dropout=0.3, norm=norm) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = rows(dtype=torch.float32)
    for _ in range(2):
        models[0](x, seed=3).square().sum().backward()
        with_hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
        models[1](x, seed=3).square().sum().backward()
        with_hook.remove()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_the_state_is_that_of_stock_modules(norm):
    model = MLP(7, (9,), 3, activation="prelu", norm=norm, dropout=0.5)
    own = ["weight", "bias", *(["running_mean", "running_var", "num_batches_tracked"] if norm == "batch" else [])]
    expected = ["layers.0.weight", "layers.1.weight", "layers.1.bias", *(f"blocks.0.0.{name}" for name in own)]
    assert list(model.state_dict()) == [*expected, "blocks.0.1.weight"]


def test_batches_are_counted_and_averages_move_as_in_stock_modules():
    model = MLP(7, (9, 4), 3, norm="batch", dtype=torch.float64)
    stock = model.to_sequential()
    for _ in range(3):
        model(rows())
        stock(rows())
    for ours, theirs in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.blocks[0][0].num_batches_tracked == 3
    model.eval()(rows())
    assert model.blocks[0][0].num_batches_tracked == 3


def test_hooked_norms_and_activations_are_called_and_the_mask_stays():
    model = MLP(7, (33,), 3, dropout=0.5, norm="batch", dtype=torch.float64)
    twin = copy.deepcopy(model)
    seen = []
    for part in (model.blocks[0][0], model.blocks[0][1]):
        part.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    torch.testing.assert_close(model(rows(), seed=1), twin(rows(), seed=1))
    assert seen == ["BatchNorm1d", "ReLU"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.blocks[0][0], "momentum", None),
        lambda model: setattr(model.blocks[1][0], "eps", 1e-3),
        lambda model: model.blocks[0][0].eval(),
        lambda model: model.blocks[1][2].eval(),
        lambda model: model.blocks[0].__setitem__(0, nn.BatchNorm1d(9, affine=False, dtype=torch.float64)),
        lambda model: model.blocks[0].__setitem__(1, nn.Hardtanh()),
        lambda model: model.blocks[0].__setitem__(0, nn.BatchNorm1d(9, track_running_stats=False).double()),
    ],
)
def test_changed_blocks_compute_what_their_modules_say(change):
    model = MLP(7, (9, 4), 3, norm="batch", activation="gelu", dtype=torch.float64)
    change(model)
    stock = nn.Sequential(*(copy.deepcopy(part) for part in model.to_sequential()))
    for ours, theirs in ((model, stock), (model.eval(), stock.eval())):
        torch.testing.assert_close(ours(rows()), theirs(rows()))
        for a, b in zip(model.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_gives_the_same_bits_whole_and_one_by_one(norm):
    model = MLP(7, (9, 4), 3, activation="prelu", norm=norm, dropout=0.2)
    x = rows(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(x, seed=1)
        model.layers[0].register_forward_hook(lambda *_: None)
        assert torch.equal(model(x, seed=1), whole)
    assert whole.dtype == torch.bfloat16
    whole.float().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
