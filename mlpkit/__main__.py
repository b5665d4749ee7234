"""``python -m mlpkit``: what was built, what this machine can run, and which path each part takes."""

from __future__ import annotations

import platform

import torch

from mlpkit import __version__

PROVEN = "linear_act_dropout by cuBLAS and the epilogue kernel"
# What each choice of MLPKIT_CUDA_KERNELS takes.
KERNELS = {
    "proven": PROVEN,
    "all": f"{PROVEN}; in bf16 and fp16 with in_features a multiple of 16 up to 256 (compute capability 8.0, 160 KB of "
    "shared memory) by the thin kernels, TrainStep in bf16 of MLPs up to 256 wide in three launches, the updates of "
    "guard.optim in two, and census; no device has measured these yet",
}

# And of MLPKIT_FP32_PRECISION.
PRODUCTS = {
    "torch": "on CUDA devices as torch.backends.cuda.matmul.fp32_precision says",
    "3xtf32": "of layers that fill a CUDA device of compute capability 8.0 or newer by two numbers of tf32 each, with "
    "MLPKIT_CUDA_KERNELS=all (no device has measured them yet)",
}


def facts() -> dict[str, str]:
    """Build and machine in words; raises BuildError where the extension is missing or was built for another torch."""
    from mlpkit import _build_config as built
    from mlpkit._ext import _C

    cuda = f"not built: {built.CUDA_MISSING or 'MLPKIT_CUDA=OFF'}"
    if built.CUDA:
        cuda = f"built with nvcc {built.CUDA_COMPILER} for {built.CUDA_ARCHITECTURES.replace(';', ', ')}"
    return {
        "mlpkit": f"{__version__}, built {built.BUILD_DATE} ({built.BUILD_TYPE}, {built.COMPILER})",
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built for {built.TORCH_VERSION})",
        "cpu kernels": f"{_C.cpu_capability()} in use; this machine runs {', '.join(_C.cpu_capabilities())}",
        "cpu products": f"own kernels; float64 by {_C.gemm_library()}; {torch.get_num_threads()} threads",
        "cuda": cuda,
        "cuda kernels": f"{_C.cuda_kernels()} (MLPKIT_CUDA_KERNELS=proven|all): {KERNELS[_C.cuda_kernels()]}",
        "fp32 product": f"{_C.fp32_precision()} (MLPKIT_FP32_PRECISION=torch|3xtf32): {PRODUCTS[_C.fp32_precision()]}",
        "wide layers": _wide_layers(built.CUDA, built.CUDA_WIDE_MISSING, built.CUTLASS),
        "cuda device": _device(built.CUDA),
    }


def _wide_layers(built: bool, missing: str, cutlass: str) -> str:
    if not built:
        return "no CUDA kernels"
    if missing:
        return f"by cuBLAS and the epilogue kernel; other kernels were not built: {missing}"
    return (
        f"from 512 in_features and out_features on, in bf16 and fp16 on compute capability 9.0, kernels of CUTLASS "
        f"{cutlass} with MLPKIT_CUDA_KERNELS=all (no device has measured them yet)"
    )


def _device(built: bool) -> str:
    if not torch.cuda.is_available():
        return "none"
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if not built:
        return f"{name}, unused: this build has no CUDA kernels"
    return f"{name} (compute capability {major}.{minor})"


def main() -> None:
    """Print the facts, one line each."""
    for key, value in facts().items():
        print(f"{key + ':':<14}{value}")


if __name__ == "__main__":
    main()
