"""functional.mlp: a whole network as one autograd node, bit for bit the layers called one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from mlpkit.errors import ArgumentError, DtypeError, ShapeError
from mlpkit.functional import linear_act_dropout, mlp

ACTIVATIONS = ["identity", "relu", "leaky_relu", "prelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]
WIDTHS = (20, 33, 17, 5)


def network(activation="relu", dtype=torch.float32, device="cpu", bias=(True, False, True)):
    """x, weights, biases and prelu slopes of a ragged network, all with gradients."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*size):
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    weights = [leaf(out, inner) for inner, out in pairwise(WIDTHS)]
    biases = [leaf(out) if wanted else None for out, wanted in zip(WIDTHS[1:], bias, strict=True)]
    slopes = [leaf(1), leaf(WIDTHS[2])] if activation == "prelu" else None
    return leaf(40, WIDTHS[0]), weights, biases, slopes


def one_by_one(x, weights, biases, *, activation, slope, p, seed):
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if layer == len(weights) - 1:
            return linear_act_dropout(x, weight, bias, activation="identity")
        own = slope[layer] if isinstance(slope, list) else slope
        x = linear_act_dropout(x, weight, bias, activation=activation, slope=own, p=p[layer], seed=seed, stream=layer)
    raise AssertionError("a network has a last layer")


def leaves(x, weights, biases, slopes):
    return [x, *weights, *(bias for bias in biases if bias is not None), *(slopes or [])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_layers_one_by_one(activation, dtype, device):
    x, weights, biases, slopes = network(activation, dtype, device)
    slope = slopes or (0.2 if activation == "leaky_relu" else None)
    options = {"activation": activation, "slope": slope, "p": [0.3, 0.5], "seed": 7}
    ours, layers = mlp(x, weights, biases, **options), one_by_one(x, weights, biases, **options)
    assert torch.equal(ours, layers)
    dy = torch.randn_like(ours)
    inputs = leaves(x, weights, biases, slopes)
    for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(layers, inputs, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", ["x", 0, 1, 2])
def test_only_the_gradients_asked_for_are_given(wanted):
    x, weights, _, _ = network()
    x, weights = x.detach(), [weight.detach() for weight in weights]
    leaf = x if wanted == "x" else weights[wanted]
    leaf.requires_grad_()
    mlp(x, weights, p=0.3, seed=1).square().sum().backward()
    given = [tensor for tensor in (x, *weights) if tensor.grad is not None]
    assert len(given) == 1
    assert given[0] is leaf
    assert leaf.grad.abs().sum() > 0


def test_gradients_agree_with_finite_differences():
    x, weights, biases, slopes = network("prelu", torch.float64)
    count = len(weights)

    def function(x, *tensors):
        middle = [tensors[count], None, tensors[count + 1]]
        return mlp(x, list(tensors[:count]), middle, activation="prelu", slope=list(tensors[-2:]), p=0.4, seed=5)

    assert torch.autograd.gradcheck(function, tuple(leaves(x, weights, biases, slopes)))


def test_a_single_layer_is_linear():
    x, weights, biases, _ = network()
    assert torch.equal(
        mlp(x, weights[:1], biases[:1]), linear_act_dropout(x, weights[0], biases[0], activation="identity")
    )


def test_evaluation_drops_nothing_and_draws_nothing():
    x, weights, biases, _ = network()
    state = torch.get_rng_state()
    assert torch.equal(mlp(x, weights, biases, p=0.9, training=False), mlp(x, weights, biases))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_drawn_seed_repeats_under_manual_seed_and_differs_from_call_to_call():
    x, weights, biases, _ = network()
    torch.manual_seed(11)
    first, second = (mlp(x, weights, biases, p=0.5) for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(first, mlp(x, weights, biases, p=0.5))
    assert not torch.equal(first, second)


def test_no_gradient_is_recorded_where_none_is_wanted():
    x, weights, biases, _ = network()
    with torch.no_grad():
        assert not mlp(x, weights, biases).requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_values_and_gradients_are_the_eager_ones():
    x, weights, _, _ = network()

    def function(x, *weights):
        return mlp(x, weights, activation="gelu", p=0.5, seed=3)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(x, *weights), function(x, *weights)
    assert torch.equal(ours, eager)
    for a, b in zip(torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(eager.sum(), weights), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_of_the_context(dtype):
    x, weights, biases, _ = network()
    with torch.autocast("cpu", dtype=dtype):
        y = mlp(x, weights, biases, p=0.2, seed=1)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert weights[0].grad.dtype == torch.float32


def test_double_backward_says_that_it_is_missing():
    x, weights, _, _ = network(dtype=torch.float64)
    (dx,) = torch.autograd.grad(mlp(x, weights, activation="tanh").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
def test_forward_mode_says_that_it_is_missing():
    x, weights, _, _ = network()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        mlp(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)), weights)


REFUSALS = {
    "no weights": (ArgumentError, "weights is empty", lambda x, w: mlp(x, [])),
    "too few biases": (ArgumentError, "biases has 1 entries", lambda x, w: mlp(x, w, [None])),
    "too few p": (ArgumentError, "p has 1 entries", lambda x, w: mlp(x, w, p=[0.1])),
    "too many slopes": (ArgumentError, "slope has 3", lambda x, w: mlp(x, w, activation="prelu", slope=[x, x, x])),
    "p None": (ArgumentError, "p is None", lambda x, w: mlp(x, w, p=None)),
    "p above 1": (ArgumentError, "p is 1.5", lambda x, w: mlp(x, w, p=1.5)),
    "p not a number": (ArgumentError, "p is nan", lambda x, w: mlp(x, w, p=math.nan)),
    "unknown activation": (ArgumentError, "layer 0: .*'swish'.*relu", lambda x, w: mlp(x, w, activation="swish")),
    "a slope for relu": (ArgumentError, "slope is 0.1", lambda x, w: mlp(x, w, slope=0.1)),
    "features": (ShapeError, "layer 0: .*5 features", lambda x, w: mlp(x[:, :5], w)),
    "a weight that does not follow": (ShapeError, "layer 1: ", lambda x, w: mlp(x, [w[0], w[2], w[2]])),
    "mixed dtypes": (DtypeError, "layer 2: .*float64", lambda x, w: mlp(x, [w[0], w[1], w[2].double()])),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(name):
    error, message, call = REFUSALS[name]
    x, weights, _, _ = network()
    with pytest.raises(error, match=message):
        call(x, weights)


def test_the_dispatched_op_is_lawful():
    x, weights, biases, _ = network(dtype=torch.float64)
    arguments = (x, weights, biases, [None] * 3, torch.tensor([1, 2]), "gelu", 0.01, [0.2, 0.3])
    torch.library.opcheck(torch.ops.mlpkit.mlp.default, arguments, test_utils=("test_schema", "test_faketensor"))
