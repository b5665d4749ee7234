"""What the wide kernels do to their accumulators, on the CPU: the bits of the element-wise kernels in every tile."""

import pytest
import torch
from emulator import find_compiler, inside, plane
from test_linear_act_dropout_emulated import OFFSET, SEED, STREAM, assert_same_bits
from wide_layer import SCHEDULES, WideLayer, find_cuda_headers, find_cutlass

from mlpkit.reference import ACTIVATIONS, dropout_mask

DTYPES = (torch.bfloat16, torch.float16)
WIDE_ACTIVATIONS = [name for name in ACTIVATIONS if name != "prelu"]
NEEDS_Z = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
# One tile of either schedule ragged on both sides, and two by two of them.
SHAPES = [(70, 136), (130, 264)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler, cutlass, cuda = find_compiler(), find_cutlass(), find_cuda_headers()
    for what, found in {"host compiler": compiler, "CUTLASS headers": cutlass, "CUDA headers": cuda}.items():
        if found is None:
            pytest.skip(f"no {what} to build the emulator with")
    return WideLayer(compiler, tmp_path_factory.mktemp("wide"), cutlass, cuda)


class Case:
    def __init__(self, shape, dtype, activation, p):
        generator = torch.Generator().manual_seed(sum(shape))
        self.product = 3 * torch.randn(*shape, generator=generator)
        self.product.view(-1)[::17] = 0.0
        self.bias = torch.randn(shape[1], generator=generator).to(dtype)
        self.bias[::5] = 0.0
        self.dy = torch.randn(*shape, generator=generator).to(dtype)
        self.dtype, self.activation, self.p = dtype, activation, p
        seed = torch.tensor([SEED, OFFSET]) if 0 < p < 1 else None
        self.options = {"bias": self.bias, "p": p, "seed": seed, "stream": STREAM}

    def saved(self, z, keep, positive):
        return {
            "p": self.p,
            "z": z if self.activation in NEEDS_Z else None,
            "keep": keep if self.activation == "relu" or 0 < self.p < 1 else None,
            "positive": positive if self.activation == "leaky_relu" else None,
        }

    def check(self, emulator, schedule):
        rows, cols = self.product.shape
        y, z, keep, positive = emulator.forward(self.product, self.dtype, self.activation, **self.options)
        wide_y, wide_keep, wide_positive, census = emulator.wide_forward(
            self.product, self.dtype, self.activation, schedule=schedule, **self.options
        )
        assert_same_bits(wide_y, y)
        owned = inside(rows, cols)
        assert torch.equal(wide_keep & owned, keep & owned)
        if self.activation == "leaky_relu":
            assert torch.equal(wide_positive & owned, positive & owned)
        assert census.tolist() == census_of(y)
        saved = self.saved(z, keep, positive)
        dz, _, _ = emulator.backward(self.dy, self.activation, **saved)
        wide_dz, _ = emulator.wide_backward(self.dy.float(), self.dtype, self.activation, **saved)
        assert_same_bits(wide_dz, dz)


def census_of(y):
    finite = y.isfinite()
    magnitudes = y[finite].view(torch.int16).int() & 0x7FFF
    return [magnitudes.max().item() if magnitudes.numel() else 0, int(not finite.all())]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", WIDE_ACTIVATIONS)
def test_the_epilogue_gives_the_bits_of_the_element_wise_kernel(emulator, activation, dtype, schedule):
    Case(SHAPES[0], dtype, activation, 0.3).check(emulator, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_tiles_side_by_side_give_the_bits_of_the_element_wise_kernel(emulator, activation, schedule):
    Case(SHAPES[1], torch.bfloat16, activation, 0.5).check(emulator, schedule)


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_no_dropout_and_nothing_but_dropout(emulator, activation, p):
    Case((33, 40), torch.bfloat16, activation, p).check(emulator, "cooperative")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_are_the_contract(emulator, schedule):
    rows, cols = SHAPES[1]
    case = Case((rows, cols), torch.bfloat16, "identity", 0.3)
    _, keep, _, _ = emulator.wide_forward(case.product, case.dtype, "identity", schedule=schedule, **case.options)
    kept, _ = dropout_mask(rows, cols, 0.3, SEED, OFFSET, STREAM)
    assert torch.equal(keep & inside(rows, cols), plane(kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 24, 300])
def test_column_sums_of_exact_numbers_are_exact(emulator, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    dy = torch.randint(-2, 3, (rows, 72), generator=generator).float()
    positive = torch.rand(rows, 72, generator=generator) < 0.5
    dz, dbias = emulator.wide_backward(dy, dtype, "relu", keep=plane(positive))
    exact = torch.where(positive, dy, 0.0)
    assert torch.equal(dz.float(), exact)
    assert torch.equal(dbias, exact.sum(0).to(dtype))


def test_column_sums_are_of_the_gradient_before_it_is_rounded(emulator):
    dy = torch.full((16, 8), 1 + 2.0**-10)
    _, dbias = emulator.wide_backward(dy, torch.float16, "identity")
    dz, from_bfloat16 = emulator.wide_backward(dy, torch.bfloat16, "identity")
    assert torch.equal(dz.float(), torch.ones(16, 8))
    assert torch.equal(dbias.float(), torch.full((8,), 16 + 2.0**-6))
    assert torch.equal(from_bfloat16.float(), torch.full((8,), 16.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_census_names_what_is_not_finite(emulator, dtype):
    product = torch.zeros(20, 40)
    product[3, 5], product[19, 39] = -2.0, 1.5
    assert emulator.wide_forward(product, dtype, "identity")[3].tolist() == census_of(product.to(dtype))
    for special in (float("nan"), float("inf"), -float("inf"), 3.4e38):  # the last is rounded to infinity
        product[17, 33] = special
        census = emulator.wide_forward(product, dtype, "identity")[3].tolist()
        assert census == census_of(product.to(dtype))
        assert census[1] == 1
