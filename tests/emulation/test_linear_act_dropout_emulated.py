"""The CUDA kernels of linear_act_dropout, run lane by lane on the CPU: the CPU kernels' bits, the contract's masks."""

from copy import copy

import pytest
import torch
from emulator import DTYPES, LinearActDropout, find_compiler, inside, plane

from mlpkit._ext import _C
from mlpkit.reference import ACTIVATIONS, dropout_mask

SHAPES = [(1, 1), (7, 33), (16, 64), (33, 151), (70, 129), (129, 72)]
NEEDS_Z = ("prelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
SEED, OFFSET, STREAM = -0x123456789ABCDEF, 0x1_0000_0007, 3


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    return LinearActDropout(compiler, tmp_path_factory.mktemp("emulator"))


@pytest.fixture(autouse=True)
def _without_multiply_add():
    """The `default` instruction set contracts nothing, like the emulator: the same formulas give the same bits."""
    before = _C.cpu_capability()
    _C.force_cpu_capability("default")
    yield
    _C.force_cpu_capability(before)


class Layer:
    """One case. The weight is the identity: x is the product, which CPU and CUDA then do the same with."""

    def __init__(self, rows, cols, dtype, activation, p, slopes=1, bias=False):
        generator = torch.Generator().manual_seed(rows * 1000 + cols)
        draw = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
        self.activation, self.p = activation, p
        self.x = 3 * draw(rows, cols)
        self.x.view(-1)[::17] = 0.0
        self.weight = torch.eye(cols, dtype=dtype)
        self.bias = draw(cols) if bias else None
        self.slope = draw(slopes) if activation == "prelu" else None
        self.seed = torch.tensor([SEED, OFFSET])
        self.dy = draw(rows, cols)

    def on_cpu(self):
        saved = (self.activation, 0.01, self.p)
        y, z, bits = torch.ops.mlpkit.linear_act_dropout_forward(
            self.x, self.weight, self.bias, self.slope, self.seed, *saved, STREAM, True
        )
        grads = torch.ops.mlpkit.linear_act_dropout_backward(
            self.dy, self.x, self.weight, self.slope, z, bits, *saved, [True, False, True, self.slope is not None]
        )
        return y, z, grads

    def forward(self, emulator, shift=0, first_tile=0):
        compute = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        threshold = int(65536 * self.p + 0.5)
        return emulator.forward(
            self.x.to(compute),
            self.x.dtype,
            self.activation,
            bias=self.bias,
            slope=self.slope,
            p=self.p,
            seed=self.seed if 0 < threshold < 65536 else None,
            stream=STREAM,
            first_tile=first_tile,
            shift=shift,
        )

    def backward(self, emulator, z, keep, positive, shift=0):
        return emulator.backward(
            self.dy,
            self.activation,
            z=z if self.activation in NEEDS_Z else None,
            slope=self.slope,
            p=self.p,
            keep=keep if self.activation == "relu" or 0 < self.p < 1 else None,
            positive=positive if self.activation == "leaky_relu" else None,
            shift=shift,
        )

    def check(self, emulator, shift=0):
        y, z, keep, positive = self.forward(emulator, shift)
        dz, _, _ = self.backward(emulator, z, keep, positive, shift)
        cpu_y, cpu_z, (cpu_dz, _, _, _) = self.on_cpu()
        assert_same_bits(y, cpu_y)
        if self.activation == "prelu":
            assert_same_bits(z, cpu_z)
        elif self.activation in NEEDS_Z and self.x.dtype.itemsize == 2:
            # The CPU saves slopes instead, rounded once more: there the device's dz is held against its own in float32.
            wide = copy(self)
            wide.dy = self.dy.float()
            dz_of_wide, _, _ = wide.backward(emulator, z.float(), keep, positive, shift)
            assert_same_bits(dz, dz_of_wide.to(dz.dtype))
            return
        # The CPU's dz comes out of a product with the identity, which turns -0 into 0.
        assert_same_bits(dz + 0.0, cpu_dz + 0.0)


def assert_same_bits(ours, theirs):
    # NaN is NaN with any payload; -0 differs from 0.
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    same = (ours == theirs) & (ours.signbit() == theirs.signbit()) | (ours.isnan() & theirs.isnan())
    wrong = (~same).nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} differ, first {wrong[0]}: {ours[wrong[0]]} and {theirs[wrong[0]]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_cpu(emulator, activation, dtype):
    Layer(33, 72, dtype, activation, 0.3, bias=True).check(emulator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes_give_the_values_of_the_cpu(emulator, shape, dtype):
    Layer(*shape, dtype, "relu", 0.5).check(emulator)
    Layer(*shape, dtype, "leaky_relu", 0.1).check(emulator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "prelu", "silu"])
def test_every_p_gives_the_values_of_the_cpu(emulator, activation, p, dtype):
    Layer(17, 40, dtype, activation, p, slopes=40).check(emulator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_off_16_byte_boundaries_gives_the_values_of_the_cpu(emulator, dtype):
    Layer(17, 64, dtype, "gelu", 0.3, bias=True).check(emulator, shift=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_product_may_lie_where_the_output_goes(emulator, dtype):
    product = torch.randn(33, 72, dtype=dtype)
    apart = emulator.forward(product, dtype, "gelu", p=0.3, seed=torch.tensor([SEED, OFFSET]))
    in_place = emulator.forward(product, dtype, "gelu", p=0.3, seed=torch.tensor([SEED, OFFSET]), in_place=True)
    for ours, theirs in zip(in_place[:2], apart[:2]):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_of_rows_give_what_the_whole_gives(emulator, dtype):
    layer = Layer(70, 40, dtype, "leaky_relu", 0.4)
    whole = layer.forward(emulator)
    rows, layer.x = layer.x, layer.x[:32]
    first = layer.forward(emulator)
    layer.x = rows[32:].clone()
    second = layer.forward(emulator, first_tile=2 * 3)
    for panels, everything in zip(zip(first, second), whole):
        assert_same_bits(torch.cat(panels), everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_inf_and_nan_go_where_the_cpu_lets_them(emulator, activation, dtype):
    layer = Layer(19, 48, dtype, activation, 0.4)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    _, z, keep, positive = layer.forward(emulator)
    layer.dy.view(-1)[::5] = special.repeat(50)[: layer.dy.view(-1)[::5].numel()]
    dz, _, _ = layer.backward(emulator, z, keep, positive)
    factor = torch.zeros(19, 48, dtype=torch.float64)
    kept, scale = dropout_mask(19, 48, 0.4, SEED, OFFSET, STREAM)
    factor[kept] = scale
    nan = (layer.dy.double() * factor).isnan()
    assert dz[nan].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_planes_are_the_mask_contract(emulator, shape, dtype):
    layer = Layer(*shape, dtype, "relu", 0.3)
    layer.x.view(-1)[::5] = float("nan")
    _, _, live, _ = layer.forward(emulator)
    kept, _ = dropout_mask(*shape, 0.3, SEED, OFFSET, STREAM)
    owned = inside(*shape)
    assert torch.equal(live & owned, plane(kept & ~(layer.x <= 0)))
    layer.activation = "leaky_relu"
    _, _, keep, positive = layer.forward(emulator)
    assert torch.equal(keep & owned, plane(kept))
    assert torch.equal(positive & owned, plane(layer.x > 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 65, 16500])
@pytest.mark.parametrize("slopes", [1, 11])
def test_sums_of_exact_numbers_are_exact(emulator, slopes, rows, dtype):
    if rows > 1000 and dtype != torch.bfloat16:
        pytest.skip("two levels of sums are the same for every dtype; one is enough at this price")
    generator = torch.Generator().manual_seed(0)
    # Few small integers and halves, so that every partial sum is a short binary fraction.
    dy = torch.randint(-1, 2, (rows, 11), generator=generator)
    dy[torch.rand(rows, 11, generator=generator) > 64 / rows] = 0
    dy, z = dy.to(dtype), torch.randint(-2, 3, (rows, 11), generator=generator).to(dtype)
    slope = torch.full((slopes,), 0.5, dtype=dtype)
    dz, dbias, dslope = emulator.backward(dy, "prelu", z=z, slope=slope)
    exact = dy.double() * torch.where(z > 0, 1.0, 0.5)
    exact_slope = (dy.double() * z.double().clamp(max=0)).sum(0)
    assert torch.equal(dz.double(), exact)
    assert torch.equal(dbias, exact.sum(0).to(dtype))
    assert torch.equal(dslope, (exact_slope if slopes == 11 else exact_slope.sum(0, keepdim=True)).to(dtype))


def test_rows_past_the_end_add_nothing_even_where_the_slope_is_nan(emulator):
    z, slope = torch.ones(3, 4), torch.full((4,), float("nan"))
    _, dbias, _ = emulator.backward(torch.ones(3, 4), "prelu", z=z, slope=slope)
    assert torch.equal(dbias, torch.full((4,), 3.0))


def test_the_emulator_notices_an_access_outside(emulator):
    with pytest.raises(AssertionError, match="outside every allocation"):
        emulator.forward(torch.zeros(16, 64), torch.float32, "relu", bias=torch.zeros(63))
