"""The thin kernels of linear_act_dropout on a CUDA device: the contract, the other path's bits, graphs and streams."""

import pytest
import torch
from linear_act_dropout_cases import Case, assert_close

from mlpkit._ext import _C
from mlpkit.functional import linear_act_dropout
from mlpkit.reference import ACTIVATIONS, dropout_mask

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 16, 1), (7, 48, 33), (151, 128, 129), (300, 144, 520), (1024, 256, 264), (4097, 128, 1000)]

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("all_cuda_kernels")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_errs_no_more_than_stock(activation, dtype):
    case = Case(151, 128, 200, activation, slopes=200 if activation == "prelu" else 0)
    assert_close(linear_act_dropout, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes_err_no_more_than_stock(shape, dtype):
    assert_close(linear_act_dropout, Case(*shape, activation="gelu"), dtype, "cuda")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "leading", "misaligned"])
def test_layouts_err_no_more_than_stock(layout):
    assert_close(linear_act_dropout, Case(150, 64, 136, "relu", layout=layout), torch.bfloat16, "cuda")


def test_masks_are_the_contract():
    x = torch.ones(333, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(250, 64, dtype=torch.bfloat16, device="cuda")
    y = linear_act_dropout(x, weight, p=0.3, seed=torch.tensor([7, 9], device="cuda"))
    keep, _ = dropout_mask(333, 250, 0.3, 7, 9, 0)
    assert torch.equal(y.cpu() != 0, keep)


def mixed(forward, backward):
    """The op with one choice of kernels forward and another backward."""

    def function(*args, **options):
        _C.force_cuda_kernels(forward)
        y = linear_act_dropout(*args, **options)
        y.register_hook(lambda dy: _C.force_cuda_kernels(backward))
        return y

    return function


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_small_two_runs_are_bitwise_equal(activation):
    case = Case(333, 128, 520, activation)
    data = {name: t.cuda() for name, t in case.data(0, torch.bfloat16).items()}
    first, again = (case.run(linear_act_dropout, data, 0) for _ in range(2))
    assert all(torch.equal(result, again[name]) for name, result in first.items())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize(("forward", "backward"), [("all", "proven"), ("proven", "all")])
def test_each_path_goes_backward_from_the_other(forward, backward, activation):
    case = Case(151, 128, 200, activation)
    assert_close(mixed(forward, backward), case, torch.bfloat16, "cuda")


def test_a_captured_graph_draws_the_masks_of_its_seed():
    x, weight, bias = (torch.randn(s, device="cuda").bfloat16() for s in [(300, 128), (520, 128), (520,)])
    seed = torch.tensor([5, 0], device="cuda")
    linear_act_dropout(x, weight, bias, p=0.5, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_act_dropout(x, weight, bias, p=0.5, seed=seed)
        seed[1] += 1
    seed[1] = 0
    seen = []
    for step in range(100):
        graph.replay()
        assert torch.equal(y, linear_act_dropout(x, weight, bias, p=0.5, seed=torch.tensor([5, step], device="cuda")))
        seen.append((y != 0).sum().item())
    assert len(set(seen)) > 50


def test_work_goes_to_the_current_stream():
    """x arrives on the stream late: work on another one would read what was there before."""
    source, weight = (torch.randn(4096, 128, device="cuda").bfloat16() for _ in range(2))
    expected = linear_act_dropout(source, weight)
    x = torch.zeros_like(source)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        y = linear_act_dropout(x, weight)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (8, 0)])
def test_empty_layers_have_zero_gradients(rows, cols):
    sizes = [(rows, 32), (cols, 32), (cols,)]
    leaves = [torch.ones(s, dtype=torch.bfloat16, device="cuda", requires_grad=True) for s in sizes]
    linear_act_dropout(*leaves, p=0.5, seed=0).sum().backward()
    assert all(not leaf.grad.any() and leaf.grad.shape == leaf.shape for leaf in leaves)
