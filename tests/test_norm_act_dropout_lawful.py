"""norm_act_dropout is a lawful op: opcheck, torch.compile, autocast, double backward, what it saves, special values."""

import math

import pytest
import torch
from norm_act_dropout_cases import Case
from torch.autograd import forward_ad

from mlpkit.functional import norm_act_dropout
from mlpkit.nn import MLP
from mlpkit.reference import ACTIVATIONS
from mlpkit.reference import norm_act_dropout as stock

NORMS = [None, "batch", "layer"]
OP = torch.ops.mlpkit.norm_act_dropout.default

# opcheck itself looks at gradients that are not there, and importing inductor uses what torch has deprecated.
opcheck = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
compiles = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")


def leaf(*size, dtype=torch.float32):
    return torch.randn(size).to(dtype).requires_grad_()


@opcheck
@pytest.mark.parametrize(
    ("activation", "dtype", "p"),
    [*((name, torch.float32, 0.5) for name in ACTIVATIONS), ("relu", torch.bfloat16, 0.0), ("tanh", torch.float64, 0)],
)
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck_finds_nothing(norm, activation, dtype, p):
    affine = (leaf(7, dtype=dtype), leaf(7, dtype=dtype)) if norm else (None, None)
    slope = leaf(1, dtype=dtype) if activation == "prelu" else None
    rest = (slope, torch.tensor([3, 0]), norm or "none", 1e-5, activation, 0.01, float(p), 0)
    torch.library.opcheck(OP, (leaf(2, 5, 7, dtype=dtype), *affine, None, None, *rest))
    if norm == "batch":
        averages = (torch.zeros(7, dtype=dtype), torch.ones(7, dtype=dtype))
        torch.library.opcheck(OP, (leaf(9, 7, dtype=dtype), *affine, *averages, *rest))


@compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("norm", NORMS)
def test_compiled_and_eager_runs_are_bitwise_equal(norm, backend):
    torch.compiler.reset()
    case = Case(33, 17, norm, "gelu")
    data = case.data(0, torch.float32)
    expected = case.run(norm_act_dropout, data, 0)
    results = case.run(torch.compile(norm_act_dropout, fullgraph=True, backend=backend), data, 0)
    for name, tensor in expected.items():
        if name.startswith("running") and backend == "inductor":  # the averages are inductor's own arithmetic
            torch.testing.assert_close(results[name], tensor)
        else:
            assert torch.equal(results[name], tensor), name


@compiles
def test_another_number_of_rows_compiles_nothing_anew():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    averages = {"running_mean": torch.zeros(17), "running_var": torch.ones(17)}

    def block(z):
        return norm_act_dropout(z, "batch", **averages, p=0.5, seed=1)

    function = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for rows in (33, 40, 51):
        z = torch.randn(rows, 17, requires_grad=True)
        assert torch.equal(*(torch.autograd.grad(f(z).square().sum(), z)[0] for f in (function, block)))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_casts_nothing(norm):
    z = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_act_dropout(z, norm).dtype == torch.float32
        affine = (torch.ones(5), torch.zeros(5)) if norm else ()
        assert norm_act_dropout(z.bfloat16(), norm, *affine).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", NORMS)
def test_double_backward_says_that_it_is_missing(norm):
    z = leaf(6, 5, dtype=torch.float64)
    (dz,) = torch.autograd.grad(norm_act_dropout(z, norm, activation="tanh").sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="norm_act_dropout: double backward"):
        dz.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_says_that_it_is_missing():
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        norm_act_dropout(forward_ad.make_dual(torch.randn(3, 4), torch.ones(3, 4)), "layer")


def test_given_statistics_are_constants():
    mean, variance = leaf(5), torch.ones(5)
    with pytest.raises(NotImplementedError, match="constants"):
        OP(torch.randn(4, 5), None, None, mean, variance, None, None, "batch", 1e-5, "relu", 0.01, 0.0, 0)


@pytest.mark.parametrize(
    ("norm", "activation", "kept"), [(None, "relu", 0), ("batch", "relu", 1), ("layer", "gelu", 1)]
)
def test_what_is_saved_is_the_input_once_the_statistics_and_a_bit_an_element(norm, activation, kept):
    rows, cols = 1024, 512
    z = (torch.randn(rows, cols, requires_grad=True) * 1.0).to(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_act_dropout(z, norm, activation=activation, p=0.5, seed=1)
    statistics = 2 * 4 * {None: 0, "batch": cols, "layer": rows}[norm]
    assert sum(t.nbytes for t in saved) == kept * z.nbytes + statistics + rows * cols // 8


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0]


def classes(t):
    """NaN, +Inf, -Inf, zero or other, elementwise."""
    return torch.where(t.isnan(), 1, 0) + 2 * t.isposinf() + 3 * t.isneginf() + 4 * (t == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fixed", [False, True])
def test_special_values_come_out_as_in_stock_pytorch(fixed, activation, dtype, cpu_capability):
    """Without a norm, and with given statistics of mean 0 and variance 1, which let each element stand alone."""
    z = torch.tensor(SPECIAL).to(dtype).repeat(40).unsqueeze(1).expand(-1, 33)
    slope = {"prelu": torch.full((1,), 0.25, dtype=dtype), "leaky_relu": 0.25}.get(activation)
    options = {"activation": activation, "slope": slope}
    if fixed:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        averages = {"running_mean": torch.zeros(33, dtype=wide), "running_var": torch.ones(33, dtype=wide)}
        options |= {"norm": "batch", "training": False, "eps": 0.0, **averages}
    else:
        options |= {"norm": None, "p": 0.5, "seed": 4}
    results = []
    for function, cast in ((norm_act_dropout, dtype), (stock, torch.float64)):
        own = {k: v.to(cast) if isinstance(v, torch.Tensor) and k == "slope" else v for k, v in options.items()}
        if cast == torch.float64:
            own |= {k: v.double() for k, v in own.items() if k.startswith("running")}
        leaf = z.to(cast).clone().requires_grad_()
        y = function(leaf, **own)
        y.backward(torch.ones_like(y))
        results.append((classes(y.detach()), classes(leaf.grad)))
    assert torch.equal(results[0][0], results[1][0])
    ordinary = z.isfinite()  # act' at Inf is stock's own affair: 0 * Inf in some of its formulas
    assert torch.equal(results[0][1][ordinary], results[1][1][ordinary])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_what_is_not_finite_stays_in_its_row_or_column(norm, bad, cpu_capability):
    z = torch.randn(70, 45)
    z[17, 21] = bad
    y = norm_act_dropout(z, norm, activation="identity")
    touched = torch.zeros(70, 45, dtype=torch.bool)
    touched[(slice(None), 21) if norm == "batch" else (17,)] = True
    assert y[touched].isnan().all()
    assert y[~touched].isfinite().all()


def test_an_infinite_mean_is_seen_in_the_running_average():
    z = torch.ones(300, 3)
    z[150, 1] = math.inf
    averages = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    norm_act_dropout(z, "batch", **averages)
    assert averages["running_mean"].tolist() == [pytest.approx(0.1), math.inf, pytest.approx(0.1)]
    assert averages["running_var"].isnan().tolist() == [False, True, False]


def test_a_skipped_step_leaves_the_averages_as_they_were():
    from mlpkit.guard import TrainStep

    model = MLP(6, (8,), 3, norm="batch", dropout=0.2)
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1))
    step(torch.randn(9, 6), torch.randn(9, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert step(torch.full((9, 6), math.inf), torch.randn(9, 3)).skipped
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_bare_ops_refuse_what_would_read_past_a_tensor():
    z, cols = torch.ones(33, 20), torch.ones(20)
    rest = (None, torch.tensor([1, 0]), "batch", 1e-5, "gelu", 0.01, 0.5, 0)
    for arguments in [
        (z, torch.ones(7), None, None, None, *rest),
        (z, cols, torch.ones(2, 10), None, None, *rest),
        (z, cols, cols, torch.ones(7), cols, *rest),
        (z, cols.double(), None, None, None, *rest),
        (z, cols, None, cols, None, *rest),
        (z[:1], cols, cols, None, None, *rest),
        (z, cols, cols, None, None, None, None, *rest[2:]),
        (z, None, None, cols, cols, None, None, "layer", *rest[3:]),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError), match="norm_act_dropout"):
            OP(*arguments)
    forward, backward = torch.ops.mlpkit.norm_act_dropout_forward, torch.ops.mlpkit.norm_act_dropout_backward
    y, mean, inverse, _, bits = forward(z, cols, cols, None, None, *rest, True)
    good = {"dy": y, "z": z, "w": cols, "b": cols, "slope": None, "mean": mean, "inverse": inverse, "bits": bits}
    tail = ("batch", False, "gelu", 0.01, 0.5, [True, True, True, False])
    backward(*good.values(), *tail)
    bad = {"dy": [y[:1], y.double()], "mean": [mean[:3]], "inverse": [inverse.double()], "bits": [bits[:1]]}
    for name, tensors in bad.items():
        for tensor in tensors:
            with pytest.raises((RuntimeError, ValueError, TypeError), match="norm_act_dropout"):
                backward(*(good | {name: tensor}).values(), *tail)
