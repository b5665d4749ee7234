"""linear_act_dropout under torch.compile(fullgraph=True) and activation checkpointing: the bits of the eager run."""

import pytest
import torch
from linear_act_dropout_cases import LOW_DTYPES, Case
from torch.utils.checkpoint import checkpoint

from mlpkit.functional import linear_act_dropout

# Importing inductor uses what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def assert_same_bits(results, expected):
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), f"{name} differs"


@pytest.mark.parametrize(
    ("backend", "activation"),
    [("inductor", "gelu"), *(("aot_eager", name) for name in ("relu", "leaky_relu", "prelu", "sigmoid"))],
)
def test_compiled_and_eager_runs_are_bitwise_equal(backend, activation):
    case = Case(33, 17, 19, activation, slopes=int(activation == "prelu"))
    data = case.data(0, torch.float32)
    expected = case.run(linear_act_dropout, data, 0)
    assert_same_bits(case.run(compiled(linear_act_dropout, backend), data, 0), expected)


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_checkpointed_runs_are_bitwise_equal():
    case = Case(33, 17, 19, "gelu")
    data = case.data(0, torch.float32)
    expected = case.run(linear_act_dropout, data, 0)

    def saving_nothing(*tensors, **options):
        return checkpoint(linear_act_dropout, *tensors, use_reentrant=False, **options)

    assert_same_bits(case.run(saving_nothing, data, 0), expected)
    assert_same_bits(case.run(compiled(saving_nothing), data, 0), expected)


def test_a_checkpoint_redraws_the_mask_that_it_drew():
    x, weight = torch.ones(40, 1), torch.full((40, 1), 2.0, requires_grad=True)
    y = checkpoint(linear_act_dropout, x, weight, activation="identity", p=0.5, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(weight.grad, y.sum(0, keepdim=True).T / 2)


def test_another_number_of_rows_compiles_nothing_anew():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.randn(19, 17, requires_grad=True)

    def layer(x):
        return linear_act_dropout(x, weight, p=0.5, seed=1)

    function = compiled(layer, counter, dynamic=True)
    counts = []
    for rows in (33, 40, 51):
        x = torch.randn(rows, 17)
        gradients = [torch.autograd.grad(f(x).square().sum(), weight)[0] for f in (function, layer)]
        assert torch.equal(*gradients)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_compiled_autocast_follows_the_dtype_of_the_context(dtype):
    case = Case(33, 17, 19, "gelu")
    data = case.data(0, torch.float32)
    data["dy"] = data["dy"].to(dtype)

    def cast(*tensors, **options):
        with torch.autocast("cpu", dtype=dtype):
            return linear_act_dropout(*tensors, **options)

    expected = case.run(cast, data, 0)
    assert expected["y"].dtype == dtype
    assert_same_bits(case.run(compiled(cast), data, 0), expected)


def two_layers(x, weight):
    """Two layers of one shape whose outputs are their masks, doubled, and their gradients as well."""
    first = linear_act_dropout(x, weight, activation="identity", p=0.5)
    return first, linear_act_dropout(x, weight, activation="identity", p=0.5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_layers_in_one_compiled_training_graph_differ(backend):
    x, weight = torch.ones(40, 1), torch.ones(40, 1, requires_grad=True)
    function = compiled(two_layers, backend)
    torch.manual_seed(5)
    first, second = function(x, weight)
    assert not torch.equal(first, second)
    # The gradient has the masks of the forward pass: the sum over rows of both.
    (first.sum() + second.sum()).backward()
    assert torch.equal(weight.grad, (first + second).sum(0, keepdim=True).T)
    again = function(x, weight)
    assert not torch.equal(first, again[0])
    torch.manual_seed(5)
    assert all(map(torch.equal, function(x, weight), (first, second)))
