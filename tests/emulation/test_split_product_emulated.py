"""Products of fp32 on tensor cores that cut off, on the CPU: as exact as fp32's own, and IEEE's Inf and NaN."""

import ctypes

import pytest
import torch
from emulator import Device, build, find_compiler, pointer, poisoned

INF, NAN = float("inf"), float("nan")
# How a and b of c = a b are stored, in the order of cuda/split_product.h: as they are, or transposed.
LAYOUTS = {"of_weight": (False, True), "plain": (False, False), "of_transposed_a": (True, False)}
# rows, cols, depth: ragged tiles, warps, slabs, and products.
SHAPES = [(4, 4, 4), (132, 68, 36), (40, 200, 100), (300, 64, 32), (36, 132, 8)]


class SplitProduct(Device):
    def __init__(self, compiler, folder):
        super().__init__(build(compiler, folder, kernels=["split_product.cu"], calls=["split_product.cpp"]))

    def takes(self, layout, rows, cols, depth):
        sizes = map(ctypes.c_int64, (rows, cols, depth))
        return bool(self._library.emulate_split_takes(*sizes, list(LAYOUTS).index(layout)))

    def multiply(self, layout, a, b):
        """a [rows, depth] times b [depth, cols]; each is stored as the layout says."""
        (rows, depth), cols = a.shape, b.shape[1]
        stored = [m.t().contiguous() if turned else m.contiguous() for m, turned in zip((a, b), LAYOUTS[layout])]
        c = poisoned(rows * cols, torch.float32)
        sizes = map(ctypes.c_int64, (rows, cols, depth))
        arguments = (*sizes, list(LAYOUTS).index(layout), *map(pointer, (*stored, c)))
        self.run("emulate_split_product", stored, [c], *arguments)
        return c.view(rows, cols)


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    return SplitProduct(compiler, tmp_path_factory.mktemp("emulator"))


def draw(rows, cols, depth, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=generator), torch.randn(depth, cols, generator=generator)


def rms(error):
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_errs_no_more_than_fp32(product, layout, shape):
    a, b = draw(*shape)
    exact = a.double() @ b.double()
    stock = torch.zeros(shape[:2])
    for k in range(shape[2]):  # one rounding a term, as SGEMM has
        stock = (stock.double() + a[:, k : k + 1].double() * b[k].double()).float()
    ours = rms(product.multiply(layout, a, b) - exact)
    # Of few terms fp32's sums are exact to half a unit; then what is left of the split counts, 2^-22 of each product.
    assert ours <= max(1.5 * rms(stock - exact), 2**-22 * rms(a.double().abs() @ b.double().abs()))


def test_a_long_sum_of_one_sign_errs_no_more_than_fp32(product):
    a, b = (m.abs() for m in draw(32, 32, 4096))
    exact = a.double() @ b.double()
    stock = torch.zeros(32, 32)
    for k in range(4096):
        stock = (stock.double() + a[:, k : k + 1].double() * b[k].double()).float()
    assert rms(product.multiply("of_weight", a, b) - exact) <= 1.5 * rms(stock - exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inf_and_nan_are_where_fp32_has_them(product, layout):
    a, b = draw(136, 132, 40)
    a[3, 5], a[70, 0], a[90, 39], b[7, 100] = INF, NAN, -INF, -INF
    a[100, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN, all bits of its fraction set
    b[5, 11] = 0.0  # 0 * Inf
    expected, found = a @ b, product.multiply(layout, a, b)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[found.isinf()], expected[found.isinf()])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_the_largest_floats_survive_the_split(product):
    largest = torch.finfo(torch.float32).max
    a, b = torch.zeros(4, 8), torch.zeros(8, 4)
    a[0, 0], b[0, 0] = largest, 1.0  # rounded to tf32 it would be Inf
    a[1, 1], b[1, 1] = largest, 2.0
    found = product.multiply("plain", a, b)
    assert found[0, 0].item() == largest
    assert found[1, 1].item() == INF
    assert found.isfinite().sum() == 15


@pytest.mark.parametrize(
    ("layout", "rows", "cols", "depth", "takes"),
    [
        ("of_weight", 3, 8, 8, True),
        ("of_weight", 3, 6, 8, False),
        ("of_weight", 3, 8, 6, False),
        ("plain", 3, 8, 8, True),
        ("plain", 3, 8, 6, False),
        ("of_transposed_a", 8, 8, 3, True),
        ("of_transposed_a", 6, 8, 3, False),
        ("plain", 8, 8, 0, False),
    ],
)
def test_rows_that_are_not_multiples_of_16_bytes_are_refused(product, layout, rows, cols, depth, takes):
    assert product.takes(layout, rows, cols, depth) is takes
