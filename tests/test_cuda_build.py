"""The CUDA kernels as machine code: for every device, without spills, with the instructions they were written for."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_code import dump, find_tool, read_kernels

from mlpkit import _build_config
from mlpkit._ext import _C

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# What a build without TORCH_CUDA_ARCH_LIST makes, and what the element-wise kernels promise besides.
DEVICES = {
    "sm_80": "arch=compute_80,code=[sm_80,compute_80]",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_75": "arch=compute_75,code=sm_75",
}
# Registers a thread may have so that as many blocks fit a multiprocessor as the kernel was written for. Keys are
# patterns of mangled names.
REGISTERS = {
    "7forwardI": 64,
    "8backwardI": 80,
    "8sum_rowsI": 128,
    "7sum_rowI": 64,
    "9pass_rowsI.*ELi4ELi2E": 128,
    "9pass_rowsI.*ELi(8ELi2|16ELi1)E": 255,
    "9add_partsE": 128,
    "13update_or_notE": 128,
    "12stream_tilesI.*Li256E": 255,
    "12stream_tilesI.*Li(64|128)E": 168,
    "11multiply_dzI": 255,
    "10add_sharesI": 64,
    "6censusE": 128,
    "5countENS0_10CensusArgs": 64,
    "7attemptE": 128,
    "6uploadE": 128,
    "13number_chunksE": 128,
    "6updateI.*ELb1E": 80,
    "6updateI.*ELb0E": 128,
    "14multiply_splitI": 168,
    "11train_queueI": 128,
    "13predict_queueI": 128,
}
# Formulas that say themselves what is contracted, bit for bit as on the CPU; cmake/cuda.cmake has the same.
FLAGS = {"guarded_census": ["-fmad=false"], "guarded_update": ["-fmad=false"]}
# What the machine code of a kernel must hold, from compute capability 8.0 on for those of the tensor cores.
WIDE_LOAD, WIDE_STORE, WIDE_COPY = r"\bLDG\.E(\.\w+)*\.128", r"\bSTG\.E(\.\w+)*\.128", r"\bLDGSTS\.E\.BYPASS\.128"
INSTRUCTIONS = {
    "8sum_rowsI": [WIDE_LOAD],
    "7forwardI": [WIDE_LOAD, WIDE_STORE],
    "8backwardI": [WIDE_LOAD, WIDE_STORE],
    "10add_sharesI": [WIDE_LOAD, WIDE_STORE],
    "12stream_tilesI": [r"\bHMMA\.16816\.F32", r"\bLDSM\.16\.M88\.4", WIDE_COPY, WIDE_STORE],
    "11multiply_dzI": [r"\bHMMA\.16816\.F32", r"\bLDSM\.16\.MT88\.4", WIDE_COPY, r"\bSTG\.E\.64"],
    "9pass_rowsI": [
        *(r"\bHMMA\.16816\.F32", r"\bLDSM\.16\.M88\.4", r"\bLDSM\.16\.MT88\.4"),
        *(WIDE_LOAD, WIDE_STORE, WIDE_COPY, r"\bSTS\.128"),
    ],
    "14multiply_splitI": [r"\bHMMA\.1688\.F32\.TF32", WIDE_COPY, r"\bSTG\.E\.64"],
    "11train_queueINS_8BFloat16": [
        *(r"\bHMMA\.16816\.F32", r"\bLDSM\.16\.M88\.4", r"\bLDSM\.16\.MT88\.4"),
        *(WIDE_LOAD, WIDE_STORE, r"\bSTS\.128"),
    ],
    "11train_queueIf": [r"\bFFMA\b", r"\bLDS\.128", WIDE_LOAD, WIDE_STORE],
    "13predict_queueINS_8BFloat16": [r"\bHMMA\.16816\.F32", r"\bLDSM\.16\.M88\.4", WIDE_LOAD],
    "13predict_queueIf": [r"\bFFMA\b", r"\bLDS\.128", WIDE_LOAD],
    "9add_partsE": [WIDE_LOAD],
    "13update_or_notE": [WIDE_LOAD, WIDE_STORE],
    "6censusE": [WIDE_LOAD, r"\bDFMA\b", r"\b(REDG?|ATOMG?)\.E(\.\w+)*\.MAX\b"],
    "6updateI": [WIDE_LOAD, WIDE_STORE],
    "5countENS0_10CensusArgs": [WIDE_LOAD, r"\bATOMG?\.E(\.\w+)*\.MAX\b|\bREDG?\.E(\.\w+)*\.MAX\b"],
}
TENSOR_CORES = (
    *("12stream_tilesI", "11multiply_dzI", "9pass_rowsI", "14multiply_splitI"),
    *("11train_queueINS_8BFloat16", "11train_queueIf", "13predict_queueINS_8BFloat16", "13predict_queueIf"),
)

# Kernels of CUTLASS, which test_wide_build.py looks at.
OF_CUTLASS = "cutlass"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def nvcc():
    found = find_tool("nvcc")
    if found is None:
        pytest.skip("nvcc is not on PATH")
    return found


def _compile(nvcc, device, folder):
    """Every kernel file for one device: object files, and what the compilers said."""

    def compile_one(kernel):
        target = folder / f"{kernel.stem}.o"
        flags = ["-std=c++17", "-O3", "-DNDEBUG", f"-gencode={DEVICES[device]}", *FLAGS.get(kernel.stem, [])]
        command = [nvcc, *flags, "-I", str(ROOT / "csrc"), "-c", str(kernel), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return target, result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        done = list(threads.map(compile_one, KERNELS))
    return [target for target, _ in done], "".join(said for _, said in done)


def _extension_holds(device):
    if not _build_config.CUDA:
        return False
    held = set(re.findall(rf"(\w+)\.{device}\.cubin", dump(Path(_C.__file__), "--list-elf")))
    return held >= {kernel.stem for kernel in KERNELS}


@pytest.fixture(scope="session", params=DEVICES)
def files(request, tmp_path_factory):
    """Where the machine code for a device lies: in the extension where that was built for it, else freshly compiled."""
    if _extension_holds(request.param):
        return request.param, [Path(_C.__file__)]
    objects, said = _compile(request.getfixturevalue("nvcc"), request.param, tmp_path_factory.mktemp(request.param))
    assert "warning" not in said, said
    return request.param, objects


@pytest.fixture(scope="session")
def kernels(files):
    device, paths = files
    found = {name: kernel for path in paths for name, kernel in read_kernels(path, device).items()}
    return {name: kernel for name, kernel in found.items() if OF_CUTLASS not in name}


def test_no_kernel_spills(kernels):
    assert kernels
    assert not [name for name, kernel in kernels.items() if kernel.uses_local_memory]


def test_kernels_stay_within_their_registers(kernels):
    for name, kernel in kernels.items():
        limits = [limit for pattern, limit in REGISTERS.items() if re.search(pattern, name)]
        assert len(limits) == 1, f"{name} has no register limit in this file"
        assert kernel.registers <= limits[0], f"{name} was written for {limits[0]} registers"


def test_newer_devices_find_ptx(files):
    device, paths = files
    if device != "sm_80":
        pytest.skip("the PTX for newer devices is that of the oldest real architecture")
    held = set(re.findall(r"(\w+)\.sm_80\.ptx", "".join(dump(path, "--list-ptx") for path in paths)))
    assert held >= {kernel.stem for kernel in KERNELS}


def test_machine_code_has_the_instructions_that_it_was_written_for(kernels, files):
    old = files[0] == "sm_75"
    found = set()
    for name, kernel in kernels.items():
        for pattern, instructions in INSTRUCTIONS.items():
            if pattern not in name or (old and pattern in TENSOR_CORES):
                continue
            found.add(pattern)
            for instruction in instructions:
                assert re.search(instruction, kernel.sass), f"{name} has no {instruction}"
    assert found == set(INSTRUCTIONS) - (set(TENSOR_CORES) if old else set())


def test_what_the_emulator_runs_compiles_for_a_device(nvcc, tmp_path):
    """The emulated device.h and the real one have the same functions: its test kernels use nearly all of them."""
    copy = tmp_path / "detectors.cu"  # beside the original lies the emulated header
    shutil.copy(ROOT / "tests" / "emulation" / "detectors.cpp", copy)
    flags = ["-std=c++17", "-O3", "-arch=sm_80", "-I", str(ROOT / "csrc")]
    subprocess.run([nvcc, *flags, "-c", str(copy), "-o", str(tmp_path / "detectors.o")], check=True)
    sass = "".join(kernel.sass for kernel in read_kernels(tmp_path / "detectors.o", "sm_80").values())
    for instruction in ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32", "LDSM.16.MT88.2", "LDGSTS", "REDUX", "BAR.SYNC"):
        assert instruction in sass, instruction


def test_a_cuda_build_registers_its_kernels():
    if not _build_config.CUDA:
        pytest.skip("mlpkit was built without CUDA")
    assert _C is not None
    for op in ("linear_act_dropout_forward", "linear_act_dropout_backward", "guarded_update", "census"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mlpkit::{op}", "CUDA"), op
