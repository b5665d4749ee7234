"""The kernels of wide layers as machine code, in the extension that was built: tensor cores, TMA, no spills."""

import re
import subprocess
from pathlib import Path

import pytest
from test_cuda_build import _tool

from mlpkit import _build_config
from mlpkit._ext import _C

# A thread of a warpgroup that computes starts with 168 registers and takes 232 or 240 of those that the producer gives.
REGISTERS = 168
FORWARD, BACKWARD = "ActDropoutNode", "SlopeNode"
KERNELS = {FORWARD: 3, BACKWARD: 2}  # bf16 in two schedules and f16; bf16 and f16

pytestmark = pytest.mark.slow


def _dump(what):
    cuobjdump = _tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on PATH and nvidia-cuda-cuobjdump is not installed")
    command = [cuobjdump, "-arch", "sm_90a", what, str(Path(_C.__file__))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def _built():
    if not _build_config.CUDA:
        pytest.skip("mlpkit was built without CUDA")
    if _build_config.CUDA_WIDE_MISSING:
        pytest.skip(f"mlpkit was built without kernels for wide layers: {_build_config.CUDA_WIDE_MISSING}")


def ours(names):
    return {name for name in names if FORWARD in name or BACKWARD in name}


@pytest.fixture(scope="module")
def sass():
    parts = (part.partition("\n") for part in _dump("--dump-sass").split("Function : ")[1:])
    return {name.strip(): body for name, _, body in parts if ours([name])}


def test_every_instance_is_there_and_no_more(sass):
    for node, count in KERNELS.items():
        assert sum(node in name for name in sass) == count, sorted(sass)


def test_nothing_spills():
    found = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _dump("--dump-resource-usage")
    )
    kernels = {name: tuple(map(int, numbers)) for name, *numbers in found if ours([name])}
    assert len(kernels) == sum(KERNELS.values())
    for name, (registers, stack, local) in kernels.items():
        assert registers <= REGISTERS, name
        assert (stack, local) == (0, 0), f"{name} uses local memory"


def test_the_machine_code_is_what_was_written_for(sass):
    everywhere = {
        "products of a warpgroup": r"\bHGMMA\.64x256x16\.F32",
        "operands by TMA": r"\bUTMALDG\.3D",
        "results by TMA": r"\bUTMASTG\.3D",
        "16 bytes a lane into shared memory": r"\bSTSM\.16\.M88\.4",
        "registers from the producer": r"\bUSETMAXREG",
    }
    for name, body in sass.items():
        for what, pattern in everywhere.items():
            assert re.search(pattern, body), f"{name}: no {what}"
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
        # Bits leave and come a byte a lane, 32 bytes a warp.
        assert re.search(r"\bSTG\.E\.U8" if FORWARD in name else r"\bLDG\.E\.U8", body), name
        if BACKWARD in name:
            assert re.search(r"\bLDSM\.16\.M88\.4", body), f"{name}: z does not come 16 bytes a lane"
