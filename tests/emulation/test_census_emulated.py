"""The CUDA kernel of census, run thread by thread on the CPU: the CPU kernel's counts, exactly."""

import ctypes
import math

import pytest
import torch
from emulator import DTYPES, Device, build, find_compiler, pointer

import mlpkit.ops.census  # noqa: F401 - registers the operator


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    library = build(compiler, tmp_path_factory.mktemp("census"), kernels=["census.cu"], calls=["census.cpp"])
    found = Device(library)
    found.become(1)
    return found


def census(device, tensors, histogram):
    rows = len(tensors)
    counts = torch.full((rows, 8), -7, dtype=torch.int64)
    extremes = torch.full((rows, 2), math.nan, dtype=torch.float64)
    bins = torch.zeros(rows, 64 if histogram else 0, dtype=torch.int64)
    tally = torch.zeros(rows * device._library.emulate_bytes_of_tally(), dtype=torch.uint8)
    finished = torch.zeros(1, dtype=torch.int32)
    device.run(
        "emulate_census",
        tensors,
        [counts, extremes, bins, tally, finished],
        rows,
        (ctypes.c_void_p * rows)(*(tensor.data_ptr() for tensor in tensors)),
        (ctypes.c_int64 * rows)(*(tensor.numel() for tensor in tensors)),
        (ctypes.c_int * rows)(*(DTYPES.index(tensor.dtype) for tensor in tensors)),
        int(histogram),
        *map(pointer, (counts, extremes, bins, tally, finished)),
    )
    return counts, extremes, bins


def assert_same(device, tensors, histogram):
    for ours, theirs in zip(
        census(device, tensors, histogram), torch.ops.mlpkit.census(tensors, histogram), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_pattern_of_16_bits(device, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert_same(device, [every, every[1:8000], every[30000:]], True)


@pytest.mark.parametrize("histogram", [False, True])
def test_a_list_of_all_dtypes_sizes_and_alignments(device, histogram):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for dtype in DTYPES:
        for size, shift in ((1, 0), (7, 1), (0, 0), (33000, 0), (4100, 3)):
            values = torch.randn(size + shift, generator=generator, dtype=torch.float64)
            values = (values * 2.0 ** torch.randint(-40, 20, values.shape, generator=generator)).to(dtype)[shift:]
            tensors.append(values)
        planted = tensors[-2]
        planted[[5, 32770]] = math.nan
        planted[32999], planted[17] = math.inf, -math.inf
        planted[100:103] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 4], dtype=dtype)
        tensors[-1][:] = 0.5  # nothing but ordinary numbers
    assert_same(device, tensors, histogram)


def test_nothing_finite(device):
    tensors = [torch.full((9,), math.nan), torch.zeros(5), torch.tensor([-math.inf])]
    assert_same(device, tensors, True)
