"""How products of float32 are made on CUDA devices."""

from __future__ import annotations

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError

PRECISIONS = ("torch", "3xtf32")


def set_fp32_precision(precision: str) -> None:
    """Choose how this library's layers multiply float32 matrices on CUDA devices; for the whole process.

    Stock PyTorch's: ``torch.backends.cuda.matmul.fp32_precision``, which knows ``"ieee"`` and ``"tf32"``.

    Args:
        precision: ``"torch"`` (the default): by torch's products, so as its own setting says. ``"3xtf32"``: on the
            tensor cores with each number split in two of tf32, whose sums round as float32's do: an error like that
            of float32, at a multiple of its speed. Inf and NaN are where IEEE has them. It is taken on compute
            capability 8.0 and newer for layers that fill the device, whose in_features and out_features (for the
            gradient by the weight the rows, too) are multiples of 4, with ``MLPKIT_CUDA_KERNELS=all``; all other
            layers, dtypes and devices keep torch's products.

    The environment variable ``MLPKIT_FP32_PRECISION`` sets the same before the first call.

    Raises:
        ArgumentError: ``precision`` is neither.

    Source: Ootomo, Yokota: Recovering single precision accuracy from Tensor Cores while surpassing the FP32
    theoretical peak performance. IJHPCA 36 (2022).
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"set_fp32_precision: precision is {precision!r}; it must be 'torch' or '3xtf32'")
    _C.set_fp32_precision(precision)


def get_fp32_precision() -> str:
    """``"torch"`` or ``"3xtf32"``: what :func:`set_fp32_precision` or the environment chose."""
    return str(_C.fp32_precision())
