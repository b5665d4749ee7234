"""linear_act_dropout is a lawful op: opcheck, autocast, double backward, its seed, nothing elementwise left to ATen."""

import pytest
import torch
from linear_act_dropout_cases import DTYPES, LOW_DTYPES, Case
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import mlpkit._ext  # noqa: F401  registers torch.ops.mlpkit
from mlpkit.functional import linear_act_dropout
from mlpkit.reference import ACTIVATIONS


def seed_words(seed=3, offset=0):
    return torch.tensor([seed, offset])


# opcheck itself looks at gradients that are not there.
opcheck = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@opcheck
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        *((name, torch.float32) for name in ACTIVATIONS),
        ("relu", torch.bfloat16),
        ("gelu", torch.float16),
        ("tanh", torch.float64),
    ],
)
def test_opcheck_finds_nothing(activation, dtype, p):
    x, weight, bias = (torch.randn(s).to(dtype).requires_grad_() for s in [(2, 5, 7), (6, 7), (6,)])
    slope = torch.rand(1, dtype=dtype, requires_grad=True) if activation == "prelu" else None
    arguments = (x, weight, bias, slope, seed_words(), activation, 0.01, p, 0)
    torch.library.opcheck(torch.ops.mlpkit.linear_act_dropout.default, arguments)


@opcheck
def test_opcheck_finds_nothing_without_bias_with_strides_or_without_rows():
    x, weight = torch.randn(7, 5).T.requires_grad_(), torch.randn(12, 7)[::2].requires_grad_()
    op = torch.ops.mlpkit.linear_act_dropout.default
    torch.library.opcheck(op, (x, weight, None, None, seed_words(), "relu", 0.01, 0.5, 1))
    empty = torch.randn(0, 7, requires_grad=True)
    torch.library.opcheck(op, (empty, weight, None, None, seed_words(), "gelu", 0.01, 0.5, 1))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_autocast_follows_the_dtype_of_the_context(dtype):
    case = Case(33, 17, 19, "gelu")
    data = case.data(0, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        # backward runs outside of the context in practice; here it must not matter.
        cast = case.run(linear_act_dropout, data | {"dy": data["dy"].to(dtype)}, 0)
    plain = case.run(linear_act_dropout, {name: tensor.to(dtype) for name, tensor in data.items()}, 0)
    assert cast["y"].dtype == dtype
    assert torch.equal(cast["y"], plain["y"])
    for name in ("x", "weight", "bias"):
        assert cast[f"gradient of {name}"].dtype == torch.float32
        assert torch.equal(cast[f"gradient of {name}"].to(dtype), plain[f"gradient of {name}"])


def test_autocast_leaves_alone_what_stock_autocast_leaves_alone():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = linear_act_dropout(x.double(), weight.double())
        assert wide.dtype == F.linear(x.double(), weight.double()).dtype == torch.float64
        mixed = linear_act_dropout(x.bfloat16(), weight, torch.zeros(5))
        assert mixed.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert linear_act_dropout(x, weight).dtype == torch.float32
    assert linear_act_dropout(x, weight).dtype == torch.float32


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_on_cuda_autocast_follows_the_dtype_of_the_context(dtype):
    x, weight = torch.randn(3, 4, device="cuda"), torch.randn(5, 4, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        y = linear_act_dropout(x, weight)
    assert torch.equal(y, linear_act_dropout(x.to(dtype), weight.to(dtype)))


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_double_backward_works_or_says_that_it_does_not(activation):
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 4), (5, 4)])
    y = linear_act_dropout(x, weight, activation=activation)
    first = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_act_dropout.*double backward|double backward.*linear_act_dropout"):
        torch.autograd.grad(sum(g.sum() for g in first), [x, weight])


@pytest.mark.parametrize(("activation", "preactivation"), [("identity", 0), ("relu", 0), ("gelu", 1)])
def test_one_bit_an_element_is_saved_for_the_mask(activation, preactivation, device):
    rows, cols = 1024, 512
    x, weight = torch.randn(rows, 8, device=device), torch.randn(cols, 8, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_act_dropout(x, weight, activation=activation, p=0.5, seed=1)
    size = sum(t.nbytes for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr()))
    assert size <= rows * cols // 8 + preactivation * rows * cols * 4


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_backward_refuses_an_input_that_was_changed_meanwhile(changed):
    tensors = {"x": torch.randn(3, 4), "weight": torch.randn(5, 4, requires_grad=True) * 1}
    y = linear_act_dropout(tensors["x"], tensors["weight"])
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_derivatives_are_right_or_refused():
    x, tangent, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    for needs_gradient in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(needs_gradient), tangent)
            with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp"):
                linear_act_dropout(dual, weight, activation="identity")


def test_the_bare_backward_op_refuses_what_would_read_past_a_tensor():
    x, weight, seed = torch.ones(33, 4), torch.ones(20, 4), seed_words()
    forward, backward = torch.ops.mlpkit.linear_act_dropout_forward, torch.ops.mlpkit.linear_act_dropout_backward
    y, z, bits = forward(x, weight, None, None, seed, "gelu", 0.01, 0.5, 0, True)
    good = {"dy": torch.ones_like(y), "x": x, "weight": weight, "slope": None, "z": z, "bits": bits}
    rest = ("gelu", 0.01, 0.5, [True, True, True, False])
    backward(*good.values(), *rest)
    bad = {"dy": [y[:1], y.double(), y[:, :7]], "z": [z[:1], z.half(), z[:0]], "bits": [bits[:1], bits[:0]]}
    for name, tensors in bad.items():
        for tensor in tensors:
            with pytest.raises((RuntimeError, ValueError, TypeError), match=f"linear_act_dropout.*{name}"):
                backward(*(good | {name: tensor}).values(), *rest)


def test_the_mask_drawn_repeats_under_manual_seed():
    x, weight = torch.ones(40, 1), torch.ones(40, 1)

    def draw():
        return linear_act_dropout(x, weight, p=0.5)

    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_no_random_number_is_drawn_without_need():
    x, weight = torch.ones(4, 1), torch.ones(4, 1)
    state = torch.get_rng_state()
    linear_act_dropout(x, weight, p=0.0)
    linear_act_dropout(x, weight, p=0.5, training=False)
    linear_act_dropout(x, weight, p=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_int_seed_is_that_seed_at_offset_0():
    x, weight = torch.ones(40, 1), torch.ones(40, 1)
    for seed in (0, -5, 2**63 - 1, -(2**63)):
        given = linear_act_dropout(x, weight, p=0.5, seed=torch.tensor([seed, 0]))
        assert torch.equal(linear_act_dropout(x, weight, p=0.5, seed=seed), given)
    assert not torch.equal(linear_act_dropout(x, weight, p=0.5, seed=torch.tensor([0, 1])), given)


def test_without_training_dropout_is_off():
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    assert torch.equal(linear_act_dropout(x, weight, p=0.9, training=False), linear_act_dropout(x, weight))


# Views, allocations and the draw of the seed. What is missing here, ATen must not do for us.
ALLOWED = {
    *("aten::" + name for name in ("empty", "empty_like", "empty_strided", "new_empty", "resize_")),
    *(
        "aten::" + name
        for name in ("view", "reshape", "_unsafe_view", "as_strided", "t", "transpose", "detach", "alias")
    ),
    *("aten::" + name for name in ("expand", "slice", "select", "unsqueeze", "squeeze", "flatten")),
    *("aten::" + name for name in ("randint", "random_")),
}


def aten_calls(run):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    return {event.name for event in record.events() if event.name.startswith("aten::")}


def test_the_profile_shows_elementwise_work_where_there_is_some():
    x, weight, bias = torch.randn(64, 16), torch.randn(32, 16), torch.randn(32)
    assert "aten::relu" in aten_calls(lambda: F.relu(F.linear(x, weight, bias))) - ALLOWED


@pytest.mark.parametrize("seed", [None, "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu"])
def test_no_elementwise_work_is_left_to_aten(activation, dtype, seed):
    case = Case(129, 70, 151, activation, slopes=int(activation == "prelu"))
    data = case.data(0, dtype)
    leaves = {name: t.requires_grad_() for name, t in data.items() if name != "dy"}

    def run():
        words = seed if seed is None else seed_words_made
        y = linear_act_dropout(
            leaves["x"],
            leaves["weight"],
            leaves["bias"],
            activation=activation,
            slope=leaves.get("slope"),
            p=0.3,
            seed=words,
        )
        y.backward(data["dy"])

    seed_words_made = seed_words()
    assert aten_calls(run) <= ALLOWED


def test_the_profile_names_forward_and_backward():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(6, 4)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        y = linear_act_dropout(x, weight, p=0.5, seed=1)
        y.backward(torch.ones_like(y))
    names = {event.name for event in record.events()}
    for op in ("linear_act_dropout_forward", "linear_act_dropout_backward"):
        assert f"mlpkit::{op}" in names


@pytest.mark.cuda
def test_on_cuda_a_captured_graph_draws_the_masks_of_its_seed_tensor():
    x, weight = torch.ones(64, 1, device="cuda"), torch.ones(48, 1, device="cuda")
    words = torch.tensor([5, 0], device="cuda")

    def run():
        return linear_act_dropout(x, weight, p=0.5, seed=words)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for offset in range(5):
        words[1] = offset
        graph.replay()
        assert torch.equal(y, run())
