"""The wide kernels on a CUDA device of compute capability 9.0: the contract, networks, graphs, the census."""

import pytest
import torch
from closeness import SEEDS, assert_no_worse_than
from linear_act_dropout_cases import Case, assert_close

from mlpkit import _build_config
from mlpkit._ext import _C
from mlpkit.functional import linear_act_dropout, mlp
from mlpkit.reference import ACTIVATIONS, dropout_mask
from mlpkit.reference import linear_act_dropout as stock

DTYPES = [torch.bfloat16, torch.float16]
WIDE_ACTIVATIONS = [name for name in ACTIVATIONS if name != "prelu"]
SHAPES = [(1, 512, 512), (129, 520, 1032), (1000, 1024, 768), (4097, 512, 2048)]

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _all_kernels():
    if _build_config.CUDA_WIDE_MISSING:
        pytest.skip(f"built without kernels for wide layers: {_build_config.CUDA_WIDE_MISSING}")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels for wide layers run on compute capability 9.0")
    before = _C.cuda_kernels()
    _C.force_cuda_kernels("all")
    yield
    _C.force_cuda_kernels(before)


def draw(*sizes, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [(torch.randn(*size, generator=generator, device="cuda") * size[-1] ** -0.25).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", WIDE_ACTIVATIONS)
def test_every_activation_errs_no_more_than_stock(activation, dtype):
    assert_close(linear_act_dropout, Case(200, 512, 520, activation), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes_err_no_more_than_stock(shape, dtype):
    assert_close(linear_act_dropout, Case(*shape, activation="gelu"), dtype, "cuda")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "leading", "misaligned"])
def test_layouts_err_no_more_than_stock(layout):
    assert_close(linear_act_dropout, Case(150, 512, 640, "relu", layout=layout), torch.bfloat16, "cuda")


@pytest.mark.parametrize("pingpong", [False, True], ids=["cooperative", "pingpong"])
@pytest.mark.parametrize("activation", WIDE_ACTIVATIONS)
def test_both_schedules_give_the_bits_of_the_contract(activation, pingpong):
    x, weight, bias = draw((333, 512), (776, 512), (776,))
    seed, options = torch.tensor([7, 9], device="cuda"), (activation, 0.01, 0.3)
    y, z, bits, census = torch.ops.mlpkit.linear_act_dropout_wide_forward(x, weight, bias, seed, *options, 4, pingpong)
    _C.force_cuda_kernels("proven")
    other = torch.ops.mlpkit.linear_act_dropout_forward(x, weight, bias, None, seed, *options, 4, True)
    keep, _ = dropout_mask(333, 776, 0.3, 7, 9, 4)
    assert not y.cpu()[~keep].any()
    assert (z.shape, bits.shape) == (other[1].shape, other[2].shape)
    if activation not in ("relu", "leaky_relu"):  # whose bits know the sign of z besides, and it is rounded twice
        assert torch.equal(bits, other[2])
    assert census.tolist() == [y.abs().max().view(torch.int16).item(), 0]


def test_the_census_sees_what_overflows():
    x, weight = (torch.full(size, 100.0, dtype=torch.float16, device="cuda") for size in [(64, 512), (512, 512)])
    weight[1:] = 0.0
    census = torch.ops.mlpkit.linear_act_dropout_wide_forward(x, weight, None, None, "identity", 0.0, 0.0, 0, False)[3]
    assert census.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", WIDE_ACTIVATIONS)
def test_the_way_down_a_network_errs_no_more_than_layer_by_layer(activation, dtype):
    """Against fp64: a stack of stock layers in this dtype, and the network with one kernel from layer to layer."""
    sizes = [512, 1024, 520, 768]
    ours, theirs, exact = [], [], []
    for seed in SEEDS:
        x, *rest = draw(
            (300, sizes[0]), *zip(sizes[1:], sizes[:-1]), *((size,) for size in sizes[1:]), dtype=dtype, seed=seed
        )
        words = torch.tensor([seed, 3], device="cuda")

        def network(x, *tensors):
            return mlp(x, tensors[:3], tensors[3:], activation=activation, p=0.2, seed=words)  # noqa: B023

        def layers(x, *tensors):
            for i in range(3):
                last = i == 2
                x = stock(
                    *(x, tensors[i], tensors[3 + i]),
                    activation="identity" if last else activation,
                    p=0.0 if last else 0.2,
                    **({} if last else {"seed": words, "stream": i}),  # noqa: B023
                )
            return x

        for function, results, kind in ((network, ours, dtype), (layers, theirs, dtype), (layers, exact, torch.double)):
            leaves = [tensor.to(kind).requires_grad_() for tensor in (x, *rest)]
            results.append(torch.autograd.grad(function(*leaves).square().mean(), leaves))
    for part, name in enumerate(["x", "w0", "w1", "w2", "b0", "b1", "b2"]):
        columns = ([run[part] for run in runs] for runs in (ours, theirs, exact))
        assert_no_worse_than(*columns, name=f"d{name}")


def test_a_captured_graph_draws_the_masks_of_its_seed():
    x, weight, bias = draw((300, 512), (1024, 512), (1024,))
    seed = torch.tensor([5, 0], device="cuda")
    linear_act_dropout(x, weight, bias, p=0.5, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_act_dropout(x, weight, bias, p=0.5, seed=seed)
        seed[1] += 1
    seed[1] = 0
    for step in range(100):
        graph.replay()
        now = torch.tensor([5, step], device="cuda")
        assert torch.equal(y, linear_act_dropout(x, weight, bias, p=0.5, seed=now))


def test_two_runs_are_bitwise_equal():
    case = Case(1000, 1024, 520, "gelu")
    data = {name: tensor.cuda() for name, tensor in case.data(0, torch.bfloat16).items()}
    first, again = (case.run(linear_act_dropout, data, 0) for _ in range(2))
    assert all(torch.equal(result, again[name]) for name, result in first.items())
