"""The libraries with fused MLP kernels of their own, where one is installed: TransformerEngine, apex, tiny-cuda-nn.

Each builder imports its library and returns a layer or a network; what is missing or fails is skipped with a reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def transformer_engine(in_features: int, out_features: int, dtype: torch.dtype) -> nn.Module:
    import transformer_engine.pytorch as te

    layer: nn.Module = te.Linear(in_features, out_features, bias=True, params_dtype=dtype, device="cuda")
    return layer


def apex(in_features: int, out_features: int, dtype: torch.dtype) -> nn.Module:
    from apex.fused_dense import FusedDense

    layer: nn.Module = FusedDense(in_features, out_features, bias=True).to("cuda", dtype)
    return layer


def tiny_cuda_nn(widths: list[int]) -> nn.Module:
    import tinycudann

    config = {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": widths[1],
        "n_hidden_layers": len(widths) - 2,
    }
    network: nn.Module = tinycudann.Network(widths[0], widths[-1], network_config=config)
    return network


LAYERS: dict[str, Callable[[int, int, torch.dtype], nn.Module]] = {
    "transformer_engine": transformer_engine,
    "apex": apex,
}
NETWORKS: dict[str, Callable[[list[int]], nn.Module]] = {"tiny-cuda-nn": tiny_cuda_nn}

# What builds, kernels and drivers of other versions raise.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def tried(name: str, attempt: Callable[[], object], skip: Callable[[str], None]) -> bool:
    """Whether the attempt succeeds; says why not. A rival may fail in any way: it must not cost the run."""
    try:
        attempt()
    except ImportError:
        skip(f"{name}: not installed")
    except FAILURES as error:
        skip(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    else:
        return True
    return False
