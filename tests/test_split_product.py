"""Products of float32 by two numbers of tf32: the choice, and on a CUDA device the kernel itself and layers on it."""

import subprocess
import sys

import pytest
import torch

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError
from mlpkit.functional import get_fp32_precision, linear_act_dropout, set_fp32_precision
from mlpkit.reference import linear_act_dropout as stock


@pytest.fixture(autouse=True)
def _as_before():
    before = get_fp32_precision()
    yield
    set_fp32_precision(before)


def test_the_choice_is_kept():
    assert get_fp32_precision() == "torch"
    set_fp32_precision("3xtf32")
    assert get_fp32_precision() == "3xtf32"


@pytest.mark.parametrize("precision", ["ieee", "", None, 3])
def test_other_precisions_are_refused(precision):
    set_fp32_precision("3xtf32")
    with pytest.raises(ArgumentError, match=r"precision is .*; it must be 'torch' or '3xtf32'"):
        set_fp32_precision(precision)
    assert get_fp32_precision() == "3xtf32"


def _facts(value):
    return subprocess.run(
        [sys.executable, "-m", "mlpkit"],
        env={"PATH": "", "MLPKIT_FP32_PRECISION": value},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses_and_python_m_mlpkit_says_so():
    assert "3xtf32 (MLPKIT_FP32_PRECISION=torch|3xtf32)" in _facts("3xtf32").stdout
    assert "MLPKIT_FP32_PRECISION is 'tf32'; it must be torch or 3xtf32" in _facts("tf32").stderr


def test_the_cpu_takes_no_notice():
    x, weight = torch.randn(40, 300), torch.randn(50, 300)
    expected = linear_act_dropout(x, weight)
    set_fp32_precision("3xtf32")
    assert torch.equal(linear_act_dropout(x, weight), expected)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def rms(error):
    return error.square().mean().sqrt().item()


@pytest.fixture
def split_layers():
    before = _C.cuda_kernels()
    _C.force_cuda_kernels("all")
    set_fp32_precision("3xtf32")
    yield
    _C.force_cuda_kernels(before)


@pytest.mark.cuda
@pytest.mark.parametrize("turned", [(False, True), (False, False), (True, False)], ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 4), (300, 132, 1000), (1024, 768, 4096)], ids=str)
def test_the_kernel_errs_no_more_than_fp32(shape, turned):
    rows, cols, depth = shape
    a, b = draw(rows, depth), draw(depth, cols, seed=1)
    a, b = (m.t().contiguous().t() if turn else m for m, turn in zip((a, b), turned, strict=True))
    exact = a.double() @ b.double()
    ours, own = rms(torch.ops.mlpkit.split_product(a, b) - exact), rms(a @ b - exact)
    assert ours <= max(1.5 * own, 2**-22 * rms(a.double().abs() @ b.double().abs()))


@pytest.mark.cuda
def test_inf_and_nan_are_where_fp32_has_them():
    a, b = draw(260, 520), draw(520, 136, seed=1)
    a[3, 5], a[70, 0], a[200, 519], b[7, 100] = float("inf"), float("nan"), -float("inf"), -float("inf")
    a[100, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    a[9, 9] = torch.finfo(torch.float32).max
    expected, found = a @ b, torch.ops.mlpkit.split_product(a, b)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.cuda
def test_layers_take_it_and_stay_exact(split_layers):
    x, weight, bias = draw(4096, 1024), draw(2048, 1024, seed=1) / 32, draw(2048, seed=2)
    inputs = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    dy = draw(4096, 2048, seed=3)
    y = linear_act_dropout(*inputs, activation="gelu")
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    set_fp32_precision("torch")
    y = linear_act_dropout(*inputs, activation="gelu")
    own = [y, *torch.autograd.grad(y, inputs, dy)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    y = stock(*wide, activation="gelu")
    exact = [y, *torch.autograd.grad(y, wide, dy.double())]
    assert not torch.equal(found[0], own[0]), "the kernel was not taken"
    for ours, theirs, right in zip(found, own, exact, strict=True):
        assert rms(ours - right) <= 1.5 * rms(theirs - right)


@pytest.mark.cuda
def test_it_can_be_captured_and_runs_on_the_current_stream(split_layers):
    a, b = draw(256, 512), draw(512, 256, seed=1)
    expected = torch.ops.mlpkit.split_product(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.ops.mlpkit.split_product(a, b)
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.cuda
def test_what_the_kernel_cannot_take_is_refused():
    a = draw(8, 8)
    for left, right in [(a[:, :6], a[:6]), (a.double(), a.double()), (a[:, 1:5], a[:4])]:
        with pytest.raises(NotImplementedError, match="split_product: the kernel takes float32"):
            torch.ops.mlpkit.split_product(left, right)
    with pytest.raises(ValueError, match=r"split_product: a has shape"):
        torch.ops.mlpkit.split_product(a, a[:4])
