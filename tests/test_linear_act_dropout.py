"""linear_act_dropout: right values and right gradients."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from closeness import SEEDS, assert_no_worse_than
from linear_act_dropout_cases import DTYPES, LAYOUTS, LOW_DTYPES, SHAPES, Case, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mlpkit.functional import linear_act_dropout
from mlpkit.reference import ACTIVATIONS
from mlpkit.reference import linear_act_dropout as stock

SLOPES = {"prelu": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_err_no_more_than_stock(activation, dtype, cpu_capability):
    assert_close(linear_act_dropout, Case(activation=activation, slopes=SLOPES.get(activation, 0)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_ragged_shapes_err_no_more_than_stock(activation, shape, dtype, cpu_capability):
    assert_close(linear_act_dropout, Case(*shape, activation=activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("activation", ["relu", "prelu", "silu"])
def test_every_p_and_no_bias_err_no_more_than_stock(activation, p, dtype):
    # 129 slopes: prelu with one slope per feature.
    case = Case(33, 70, 129, activation=activation, p=p, bias=False, slopes=129 if activation == "prelu" else 0)
    assert_close(linear_act_dropout, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_leading_dimensions_err_no_more_than_stock(layout, dtype):
    assert_close(linear_act_dropout, Case(129, 70, 33, "gelu_tanh", layout=layout), dtype)
    assert_close(linear_act_dropout, Case(129, 70, 33, "leaky_relu", layout=layout), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_panels_err_no_more_than_stock(dtype, cpu_capability):
    assert_close(linear_act_dropout, Case(777, 300, 533, "gelu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(33, 6000, 40), (6000, 33, 40), (5, 6000, 3), (129, 40, 6000)], ids=str)
def test_long_sums_err_no_more_than_stock(shape, dtype, cpu_capability):
    """Sums over in_features (y), rows (the gradients of weight and bias) and out_features (that of x)."""
    assert_close(linear_act_dropout, Case(*shape, "silu"), dtype)


RANGES = [(-0.01, 0.01), (-1, 1), (-6, -2), (2, 6), (-20, 20), (-100, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", sorted({*ACTIVATIONS} - {"identity", "prelu"}))
def test_each_activation_and_slope_errs_no_more_than_stock_on_every_range(activation, dtype, cpu_capability):
    """z is x itself and the gradient of x the slope: nothing else rounds."""

    def value_and_slope(function, x):
        x = x.clone().requires_grad_()
        y = function(x, torch.ones(1, 1, dtype=x.dtype), activation=activation)
        return torch.stack([y.detach(), *torch.autograd.grad(y.sum(), x)])

    for low, high in RANGES:
        inputs = [torch.empty(4096, 1).uniform_(low, high).to(dtype) for _ in SEEDS]
        ours, theirs, exact = [], [], []
        for x in inputs:
            ours.append(value_and_slope(linear_act_dropout, x))
            theirs.append(value_and_slope(stock, x))
            exact.append(value_and_slope(stock, x.double()))
        for part, name in enumerate(["value", "slope"]):
            columns = ([run[part] for run in runs] for runs in (ours, theirs, exact))
            assert_no_worse_than(*columns, name=f"{activation}: {name} on [{low}, {high}]")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(151, 129, 151), *SHAPES], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_cuda_values_and_gradients_err_no_more_than_stock(activation, shape, dtype):
    assert_close(linear_act_dropout, Case(*shape, activation, slopes=SLOPES.get(activation, 0)), dtype, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_any_strides_err_no_more_than_stock(layout, dtype):
    assert_close(linear_act_dropout, Case(129, 70, 33, "gelu", layout=layout), dtype, "cuda")


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_65536_terms_of_one_sign_are_summed_as_if_exactly(dtype, device, cpu_capability):
    """An accumulator of the low dtype stalls at 256 (bf16) or 2048 (fp16) terms; a single fp32 chain drifts."""
    terms = 65536
    results = {"y": [], "gradient of x": [], "gradient of weight": [], "gradient of bias": []}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        few, many, columns = (
            (torch.rand(size, generator=generator) / 64 + 1 / 64).to(dtype)
            for size in [(2, terms), (3, terms), (terms, 3)]
        )
        exact = few.double() @ many.double().T
        # A layer of 65536 inputs, one of 65536 outputs, and one of 65536 rows.
        wide = linear_act_dropout(few.to(device), many.to(device))
        results["y"].append((wide, exact))
        x = torch.ones(2, 3, dtype=dtype, device=device, requires_grad=True)
        tall = linear_act_dropout(x, many.T.contiguous().to(device), activation="identity")
        tall.backward(few.to(device))
        results["gradient of x"].append((x.grad, exact))
        weight = torch.ones(3, 2, dtype=dtype, device=device, requires_grad=True)
        bias = torch.zeros(3, dtype=dtype, device=device, requires_grad=True)
        deep = linear_act_dropout(few.T.contiguous().to(device), weight, bias, activation="identity")
        deep.backward(columns.to(device))
        results["gradient of weight"].append((weight.grad, columns.double().T @ few.double().T))
        results["gradient of bias"].append((bias.grad, columns.double().sum(0)))
    for name, pairs in results.items():
        ours, exact = ([pair[part].detach().cpu() for pair in pairs] for part in (0, 1))
        assert_no_worse_than(ours, [c.to(dtype) for c in exact], exact, name)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "prelu by feature"])
def test_gradcheck_holds_in_fp64(activation, p):
    slope = None
    if activation.startswith("prelu"):
        slope = torch.rand(5 if activation.endswith("feature") else 1, dtype=torch.float64, requires_grad=True)
    x, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in [(2, 3, 4), (5, 4), (5,)])

    def run(x, weight, bias, slope=None):
        name = activation.split()[0]
        return linear_act_dropout(x, weight, bias, activation=name, slope=slope, p=p, seed=5)

    assert torch.autograd.gradcheck(run, (x, weight, bias) if slope is None else (x, weight, bias, slope))


class BackwardOutputs(TorchDispatchMode):
    """Notes what linear_act_dropout_backward returned."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "linear_act_dropout_backward" in str(function):
            self.outputs.extend(result)
        return result


@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_only_the_gradients_asked_for_are_computed(activation):
    names = ["x", "weight", "bias", "slope"][: 4 if activation == "prelu" else 3]
    case = Case(33, 17, 19, activation, slopes=int(activation == "prelu"))
    data = case.data(0, torch.float32)

    def gradients(asked):
        leaves = {name: data[name].detach().requires_grad_(name in asked) for name in names}
        y = linear_act_dropout(
            *(leaves[n] for n in names[:3]), activation=activation, slope=leaves.get("slope"), p=0.3, seed=1
        )
        assert y.requires_grad == bool(asked)
        outputs = BackwardOutputs()
        if asked:
            with outputs:
                y.backward(data["dy"])
            computed = [t for t in outputs.outputs if isinstance(t, torch.Tensor) and t.numel()]
            assert len(computed) == len(asked)
        return {name: leaf.grad for name, leaf in leaves.items()}

    complete = gradients(names)
    for asked in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names))):
        got = gradients(asked)
        for name in names:
            assert (got[name] is not None) == (name in asked)
            assert got[name] is None or torch.equal(got[name], complete[name]), f"{name} differs when asked for {asked}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "cols"), [((0, 4), 3), ((2, 0, 4), 3), ((5, 4), 0), ((0, 4), 0), ((5, 0), 3), ((4,), 3)]
)
def test_empty_and_one_dimensional_inputs_work(shape, cols, dtype, device):
    x, weight = (torch.ones(s, dtype=dtype, device=device, requires_grad=True) for s in [shape, (cols, shape[-1])])
    bias = torch.full((cols,), 2.0, dtype=dtype, device=device, requires_grad=True)
    y = linear_act_dropout(x, weight, bias, p=0.5, seed=0)
    assert y.shape == (*shape[:-1], cols)
    assert y.dtype == dtype
    if shape[-1] == 0:
        # No terms: y is the bias alone, kept and doubled or dropped.
        assert set(y.unique().tolist()) <= {0.0, 4.0}
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight)) or x.numel() > 0
    assert torch.equal(bias.grad, (y != 0).reshape(-1, cols).sum(0).to(dtype) * 2) if y.numel() else not bias.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 64, 256), (77, 515, 129), (3, 2048, 40)], ids=str)
def test_threads_and_repetition_change_no_bit(shape, dtype, cpu_capability):
    case = Case(*shape, activation="gelu")
    data = case.data(0, dtype)
    first = case.run(linear_act_dropout, data, 0)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = case.run(linear_act_dropout, data, 0)
        for name, result in first.items():
            assert torch.equal(result, again[name]), f"{name} differs with {threads} threads"


def test_calls_from_several_python_threads_change_no_bit():
    case = Case(256, 64, 128, activation="gelu")
    data = case.data(0, torch.float32)
    expected = case.run(linear_act_dropout, data, 0)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: case.run(linear_act_dropout, data, 0), range(16)))
    assert all(torch.equal(run[name], expected[name]) for run in runs for name in expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_two_runs_are_bitwise_equal(dtype):
    case = Case(777, 300, 533, "gelu")
    data = {name: tensor.cuda() for name, tensor in case.data(0, dtype).items()}
    first, again = (case.run(linear_act_dropout, data, 0) for _ in range(2))
    assert all(torch.equal(result, again[name]) for name, result in first.items())


def test_inputs_are_left_as_they_were():
    case = Case(33, 17, 19, "gelu")
    data = case.data(0, torch.float32)
    before = {name: tensor.clone() for name, tensor in data.items()}
    case.run(linear_act_dropout, data, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in data.items())
