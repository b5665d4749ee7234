"""How a network's weights start: draws by name, a check of what a start does, a search for one that is finite.

Layer: beside functional; nn builds on it.
"""

from mlpkit.init.draws import NAMES, apply, he_normal, he_uniform, normal, variance, xavier_normal, xavier_uniform
from mlpkit.init.search import FoundStd, StdTry, find_std
from mlpkit.init.signals import InitCheck, LayerCheck, check

__all__ = [
    "NAMES",
    "FoundStd",
    "InitCheck",
    "LayerCheck",
    "StdTry",
    "apply",
    "check",
    "find_std",
    "he_normal",
    "he_uniform",
    "normal",
    "variance",
    "xavier_normal",
    "xavier_uniform",
]
