"""How a network's weights start: draws by name, and a check of what a start does to signals and gradients.

Layer: beside functional; nn builds on it.
"""

from mlpkit.init.draws import NAMES, apply, he_normal, he_uniform, normal, variance, xavier_normal, xavier_uniform
from mlpkit.init.signals import InitCheck, LayerCheck, check

__all__ = [
    "NAMES",
    "InitCheck",
    "LayerCheck",
    "apply",
    "check",
    "he_normal",
    "he_uniform",
    "normal",
    "variance",
    "xavier_normal",
    "xavier_uniform",
]
