"""One program of the corpus as a script: ``program.py NAME VARIANT``."""

import sys

import torch

from corpus import CASES, HEALTHY, VARIANTS, execute

if __name__ == "__main__":
    variant = VARIANTS[int(sys.argv[2])]
    if sys.argv[1] in CASES:
        execute(CASES[sys.argv[1]], variant)
    else:
        torch.manual_seed(variant.seed)
        HEALTHY[sys.argv[1]](variant)
