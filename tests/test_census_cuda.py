"""The census on a CUDA device: the CPU's counts, exactly."""

import math

import pytest
import torch

import mlpkit

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("all_cuda_kernels")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lists_have_the_cpus_counts(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for size in (0, 1, 7, 4097, 1_000_003):
        values = torch.randn(size + 1, generator=generator, dtype=torch.float64)
        values = (values * 2.0 ** torch.randint(-60, 60, values.shape, generator=generator)).to(dtype)
        if size > 4000:
            values[[9, 4000]], values[77] = math.nan, -math.inf
        tensors.append(values[1:])
    many = tensors * 30  # more than the arguments of one launch hold
    ours = torch.ops.mlpkit.census([tensor.cuda() for tensor in many], True)
    theirs = torch.ops.mlpkit.census(many, True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern_of_16_bits(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert mlpkit.census(every.cuda(), histogram=True) == mlpkit.census(every, histogram=True)
