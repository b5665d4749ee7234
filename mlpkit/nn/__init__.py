"""Modules on the fused op: one layer, a whole multi-layer perceptron, and what one does with a network of them.

Layer: above functional and init, below guard and tune.
"""

from mlpkit.nn.footprint import Footprint, LayerFootprint, memory_footprint
from mlpkit.nn.fusion import FuseEntry, FuseReport, fuse, fuse_report
from mlpkit.nn.layers import ACTIVATIONS, FusedLinear
from mlpkit.nn.mlp import MLP
from mlpkit.nn.noise import DropConnect, GaussianNoise
from mlpkit.nn.predict import MCPrediction, predict_mc

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "DropConnect",
    "Footprint",
    "FuseEntry",
    "FuseReport",
    "FusedLinear",
    "GaussianNoise",
    "LayerFootprint",
    "MCPrediction",
    "fuse",
    "fuse_report",
    "memory_footprint",
    "predict_mc",
]
