"""The CUDA kernels as machine code: for every device, without spills, with the instructions they were written for."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# What a build without TORCH_CUDA_ARCH_LIST makes, and what the element-wise kernels promise besides.
DEVICES = {"sm_80": ("compute_80", "sm_80"), "sm_90a": ("compute_90a", "sm_90a"), "sm_75": ("compute_75", "sm_75")}
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
    "9add_partsE": [WIDE_LOAD],
    "13update_or_notE": [WIDE_LOAD, WIDE_STORE],
    "6censusE": [WIDE_LOAD, r"\bDFMA\b", r"\b(REDG?|ATOMG?)\.E(\.\w+)*\.MAX\b"],
    "6updateI": [WIDE_LOAD, WIDE_STORE],
    "5countENS0_10CensusArgs": [WIDE_LOAD, r"\bATOMG?\.E(\.\w+)*\.MAX\b|\bREDG?\.E(\.\w+)*\.MAX\b"],
}
TENSOR_CORES = ("12stream_tilesI", "11multiply_dzI", "9pass_rowsI")

pytestmark = pytest.mark.slow


def _tool(name):
    """A CUDA tool on PATH or in the package that PyPI has of it."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return shutil.which(name) or next((str(path) for path in sorted(packages.glob(f"*/bin/{name}"))), None)


@pytest.fixture(scope="session")
def nvcc():
    found = _tool("nvcc")
    if found is None:
        pytest.skip("nvcc is not on PATH")
    return found


@pytest.fixture(scope="session", params=DEVICES)
def compiled(request, nvcc, tmp_path_factory):
    """Every kernel file for one device: object files and what ptxas said of each kernel."""
    folder = tmp_path_factory.mktemp(request.param)
    arch, code = DEVICES[request.param]
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v", f"-gencode=arch={arch},code={code}"]
    report, objects = "", []
    for kernel in KERNELS:
        objects.append(folder / f"{kernel.stem}.o")
        own = FLAGS.get(kernel.stem, [])
        command = [nvcc, *flags, *own, "-I", str(ROOT / "csrc"), "-c", str(kernel), "-o", str(objects[-1])]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        report += result.stderr
    return objects, report


def test_no_kernel_spills(compiled):
    _, report = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills
    assert set(spills) == {("0", "0", "0")}, report


def test_kernels_stay_within_their_registers(compiled):
    _, report = compiled
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", report, flags=re.DOTALL)
    assert len(found) == report.count("Compiling entry function") > 0
    for name, registers in found:
        limits = [limit for kernel, limit in REGISTERS.items() if re.search(kernel, name)]
        assert len(limits) == 1, f"{name} has no register limit in this file"
        assert int(registers) <= limits[0], f"{name} uses {registers} registers, it was written for {limits[0]}"


def test_nothing_warns(compiled):
    _, report = compiled
    assert "warning" not in report, report


def test_ptx_for_newer_devices_compiles(nvcc, tmp_path):
    for kernel in KERNELS:
        target = tmp_path / f"{kernel.stem}.ptx"
        command = [nvcc, "-std=c++17", "-O3", "-arch=compute_80", "-ptx", "-I", str(ROOT / "csrc")]
        subprocess.run([*command, str(kernel), "-o", str(target)], check=True)
        assert ".target sm_80" in target.read_text()


def test_what_the_emulator_runs_compiles_for_a_device(nvcc, tmp_path):
    """The emulated device.h and the real one have the same functions: its test kernels use nearly all of them."""
    copy = tmp_path / "detectors.cu"  # beside the original lies the emulated header
    shutil.copy(ROOT / "tests" / "emulation" / "detectors.cpp", copy)
    flags = ["-std=c++17", "-O3", "-arch=sm_80", "-I", str(ROOT / "csrc")]
    subprocess.run([nvcc, *flags, "-c", str(copy), "-o", str(tmp_path / "detectors.o")], check=True)
    sass = "".join(_sass([tmp_path / "detectors.o"]).values())
    for instruction in ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32", "LDSM.16.MT88.2", "LDGSTS", "REDUX", "BAR.SYNC"):
        assert instruction in sass, instruction


def _sass(objects):
    """The instructions of each kernel, by mangled name."""
    cuobjdump = _tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on PATH and nvidia-cuda-cuobjdump is not installed")
    functions = {}
    for path in objects:
        text = subprocess.run([cuobjdump, "--dump-sass", str(path)], capture_output=True, text=True, check=True).stdout
        for part in text.split("Function : ")[1:]:
            name, _, body = part.partition("\n")
            functions[name.strip()] = body
    assert functions, "cuobjdump printed no function"
    return functions


def test_machine_code_has_the_instructions_that_it_was_written_for(compiled, request):
    objects, _ = compiled
    old = "sm_75" in request.node.callspec.id
    found = set()
    for name, body in _sass(objects).items():
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
        for kernel, instructions in INSTRUCTIONS.items():
            if kernel not in name or (old and kernel in TENSOR_CORES):
                continue
            found.add(kernel)
            for instruction in instructions:
                assert re.search(instruction, body), f"{name} has no {instruction}"
    assert found == set(INSTRUCTIONS) - (set(TENSOR_CORES) if old else set())


def test_a_cuda_build_registers_its_kernels():
    from mlpkit import _build_config
    from mlpkit._ext import _C

    if not _build_config.CUDA:
        pytest.skip("mlpkit was built without CUDA")
    assert _C is not None
    for op in ("linear_act_dropout_forward", "linear_act_dropout_backward", "guarded_update", "census"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mlpkit::{op}", "CUDA"), op
