"""The thin kernels of linear_act_dropout on the CPU: the precision contract, the contract's masks, many schedules."""

import pytest
import torch
from emulator import find_compiler, inside, plane
from linear_act_dropout_cases import Case, assert_close
from thin_layer import NEEDS_Z, ThinLayer

from mlpkit.reference import ACTIVATIONS, activate, dropout_mask

DTYPES = [torch.bfloat16, torch.float16]
# rows, in_features, out_features: ragged in rows and columns, every depth class, more than one strip and share.
SHAPES = [(1, 16, 1), (7, 48, 33), (33, 64, 136), (70, 128, 129), (129, 80, 72), (65, 144, 40), (17, 256, 264)]
SEED, OFFSET, STREAM = -0x123456789ABCDEF, 0x1_0000_0007, 3
WORDS = torch.tensor([SEED, OFFSET])


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    return ThinLayer(compiler, tmp_path_factory.mktemp("emulator"))


def case_of(activation, shape=(70, 48, 72), **others):
    rows, inner, cols = shape
    return Case(rows=rows, inner=inner, cols=cols, activation=activation, **others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_errs_no_more_than_stock(layer, activation, dtype):
    assert_close(layer, case_of(activation, slopes=72 if activation == "prelu" else 0), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes_err_no_more_than_stock(layer, shape):
    assert_close(layer, case_of("relu", shape, bias=shape[0] != 7), torch.bfloat16)


def test_one_slope_for_all_columns_errs_no_more_than_stock(layer):
    assert_close(layer, case_of("prelu", slopes=1), torch.float16)


def draw(shape, dtype=torch.bfloat16, seed=0):
    rows, inner, cols = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, inner), (cols, inner), (cols,), (rows, cols)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("shape", [(33, 16, 151), (70, 128, 40)], ids=str)
def test_bit_planes_are_the_mask_contract(layer, shape):
    x, weight, bias, _ = draw(shape)
    x[3] = float("nan")
    rows, _, cols = shape
    kept, _ = dropout_mask(rows, cols, 0.3, SEED, OFFSET, STREAM)
    owned = inside(rows, cols)
    options = {"p": 0.3, "seed": WORDS, "stream": STREAM}
    live = layer.forward(x, weight, bias, activation="relu", **options)
    dead = (live.y == 0) & kept
    assert torch.equal(live.keep & owned, plane(kept & ~dead))
    assert live.y[3][kept[3]].isnan().all()
    signs = layer.forward(x, weight, bias, activation="leaky_relu", **options)
    assert torch.equal(signs.keep & owned, plane(kept))
    preactivation = layer.forward(x, weight, bias, activation="identity").y
    assert torch.equal(signs.positive & owned, plane(preactivation > 0))
    for activation in ("gelu", "tanh"):
        assert torch.equal(layer.forward(x, weight, bias, activation=activation, **options).keep & owned, plane(kept))


def run_both(layer, shape, activation, p, dtype=torch.bfloat16, seed=0, shift=0):
    x, weight, bias, dy = draw(shape, dtype, seed)
    slope = torch.full((1,), 0.25, dtype=dtype) if activation == "prelu" else None
    options = {"activation": activation, "p": p, "slope": slope}
    saved = layer.forward(x, weight, bias, seed=WORDS, stream=STREAM, shift=shift, **options)
    if shift:
        dy = torch.cat([dy.new_zeros(shift), dy.flatten()])[shift:].reshape(dy.shape)
    return saved, layer.backward(dy, x, weight, saved, **options)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu", "gelu"])
def test_schedules_and_devices_change_no_bit_of_the_forward_pass(layer, activation):
    reference, _ = run_both(layer, (130, 48, 200), activation, 0.3)
    for processors in (1, 2, 7, 132):
        layer.become(processors)
        saved, gradients = run_both(layer, (130, 48, 200), activation, 0.3)
        assert_same(saved, reference)
        assert_same(run_both(layer, (130, 48, 200), activation, 0.3)[1], gradients)  # another schedule, the same sums
    layer.become(3)


def test_memory_off_16_byte_boundaries_gives_the_same_bits(layer):
    reference = run_both(layer, (33, 48, 72), "gelu", 0.3)
    shifted = run_both(layer, (33, 48, 72), "gelu", 0.3, shift=1)
    assert_same(shifted[0], reference[0])
    assert_same(shifted[1], reference[1])


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_all_or_nothing_is_kept(layer, activation, p):
    saved, gradients = run_both(layer, (33, 32, 40), activation, p)
    if p == 1.0:
        assert all(not t.any() for t in (saved.y, *gradients[:3]))
    else:
        assert_close(layer, case_of(activation, (33, 32, 40), p=p), torch.bfloat16)


def test_long_sums_go_by_blocks(layer):
    """More than 64 tiles of terms in one share; small integers, so that every sum is exact."""
    layer.become(1)
    generator = torch.Generator().manual_seed(0)
    rows, inner, cols = 4200, 16, 8
    numbers = lambda *size: torch.randint(-1, 2, size, generator=generator).bfloat16()  # noqa: E731
    x, weight, dy = numbers(rows, inner), numbers(cols, inner), numbers(rows, cols)
    dy[torch.rand(rows, cols, generator=generator) > 0.02] = 0
    saved = layer.forward(x, weight, activation="identity")
    gradients = layer.backward(dy, x, weight, saved, activation="identity")
    layer.become(3)
    assert torch.equal(gradients.dx.double(), dy.double() @ weight.double())
    assert torch.equal(gradients.dweight.double(), dy.double().t() @ x.double())
    assert torch.equal(gradients.dbias.double(), dy.double().sum(0))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_rows_past_the_end_add_nothing_and_nan_goes_through(layer, activation):
    x, weight, bias, dy = draw((19, 16, 40))
    weight[7] = float("nan")
    saved = layer.forward(x, weight, bias, activation=activation)
    assert saved.y[:, 7].isnan().all()
    assert not saved.y[:, :7].isnan().any()
    dx, dweight, dbias, _ = layer.backward(dy, x, weight, saved, activation=activation)
    assert dx.isnan().all()
    others = torch.arange(40) != 7
    assert not dweight[others].isnan().any()
    assert not dbias[others].isnan().any()
    assert activation in NEEDS_Z or not dbias.isnan().any()


def test_only_what_is_wanted_is_written(layer):
    x, weight, bias, dy = draw((40, 32, 72))
    saved = layer.forward(x, weight, bias, activation="relu")
    everything = layer.backward(dy, x, weight, saved, activation="relu")
    for wanted in [(True, False, False), (False, True, False), (False, False, True)]:
        some = layer.backward(dy, x, weight, saved, activation="relu", wanted=wanted)
        for ours, theirs, want in zip(some, everything, wanted):
            assert torch.equal(ours, theirs) if want else ours is None


def test_layers_that_are_not_thin_are_refused(layer):
    assert layer.takes(torch.bfloat16, 16)
    assert layer.takes(torch.float16, 256)
    for dtype, depth in [(torch.float32, 128), (torch.bfloat16, 0), (torch.bfloat16, 24), (torch.float16, 272)]:
        assert not layer.takes(dtype, depth)
    layer.become(3, shared_bytes=99 * 1024)
    assert not layer.takes(torch.bfloat16, 128)
    layer.become(3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_numbers_go_where_float_takes_them(layer, activation):
    """NaN, Inf, zeros and the largest float16 through value and slope, beside PyTorch in fp64; z is the bias."""
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8, 14.0, -14.0, 0.25]
    bias = torch.tensor(special, dtype=torch.float16)
    x, weight = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(len(special), 16, dtype=torch.float16)
    slope = torch.full((1,), 0.25, dtype=torch.float16) if activation == "prelu" else None
    options = {"activation": activation, "slope": slope}
    saved = layer.forward(x, weight, bias, **options)
    _, _, dbias, _ = layer.backward(torch.eye(16, len(special)).half(), x, weight, saved, **options)
    z = bias.double().requires_grad_()
    y = activate(z, activation, None if slope is None else slope.double())
    y.sum().backward()
    for ours, exact in ((saved.y[0], y.detach()), (dbias, z.grad)):
        ordinary = exact.isfinite()
        assert torch.equal(ours[~ordinary].isnan(), exact[~ordinary].isnan())
        assert torch.equal(ours[~ordinary].double().nan_to_num(), exact[~ordinary].nan_to_num())
        assert ours[ordinary].isfinite().all()
