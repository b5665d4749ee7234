"""Short training programs with one planted fault each, and healthy ones; every truth is established by running it.

Each program takes a variant (other sizes, nesting, seed, loss) and whether the fault is planted; without the fault the
same program must be healthy. ``oracle.py`` proves both without mlpkit.
"""

from corpus import backward, external, forward, half, optimizer, quiet, silent  # noqa: F401
from corpus.case import CASES, HEALTHY, VARIANTS, Case, Variant, execute

__all__ = ["CASES", "HEALTHY", "VARIANTS", "Case", "Variant", "execute"]
