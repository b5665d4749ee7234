"""The kernels of wide layers as machine code, in the extension that was built: tensor cores, TMA, no spills."""

import re
from pathlib import Path

import pytest
from cuda_code import read_kernels

from mlpkit import _build_config
from mlpkit._ext import _C

# A thread of a warpgroup that computes starts with 168 registers and takes 232 or 240 of those that the producer gives.
REGISTERS = 168
FORWARD, BACKWARD = "ActDropoutNode", "SlopeNode"
KERNELS = {FORWARD: 3, BACKWARD: 2}  # bf16 in two schedules and f16; bf16 and f16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _built():
    if not _build_config.CUDA:
        pytest.skip("mlpkit was built without CUDA")
    if _build_config.CUDA_WIDE_MISSING:
        pytest.skip(f"mlpkit was built without kernels for wide layers: {_build_config.CUDA_WIDE_MISSING}")


@pytest.fixture(scope="module")
def kernels():
    found = read_kernels(Path(_C.__file__), "sm_90a")
    return {name: kernel for name, kernel in found.items() if FORWARD in name or BACKWARD in name}


def test_every_instance_is_there_and_no_more(kernels):
    for node, count in KERNELS.items():
        assert sum(node in name for name in kernels) == count, sorted(kernels)


def test_nothing_spills(kernels):
    for name, kernel in kernels.items():
        assert kernel.registers <= REGISTERS, name
        assert not kernel.uses_local_memory, name


def test_the_machine_code_is_what_was_written_for(kernels):
    everywhere = {
        "products of a warpgroup": r"\bHGMMA\.64x256x16\.F32",
        "operands by TMA": r"\bUTMALDG\.3D",
        "results by TMA": r"\bUTMASTG\.3D",
        "16 bytes a lane into shared memory": r"\bSTSM\.16\.M88\.4",
        "registers from the producer": r"\bUSETMAXREG",
    }
    for name, kernel in kernels.items():
        for what, pattern in everywhere.items():
            assert re.search(pattern, kernel.sass), f"{name}: no {what}"
        # Bits leave and come a byte a lane, 32 bytes a warp.
        assert re.search(r"\bSTG\.E\.U8" if FORWARD in name else r"\bLDG\.E\.U8", kernel.sass), name
        if BACKWARD in name:
            assert re.search(r"\bLDSM\.16\.M88\.4", kernel.sass), f"{name}: z does not come 16 bytes a lane"
