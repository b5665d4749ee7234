"""Accuracy of diagnosis on the corpus of planted faults, beside anomaly mode and an is-finite mode: a table and JSON.

``python benchmarks/accuracy.py [--variants 012] [--out benchmarks/results]``
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from corpus import CASES, HEALTHY, VARIANTS, execute
from corpus.scorecard import lines, score


def healthy(name: str, variant: int) -> None:
    torch.manual_seed(VARIANTS[variant].seed)
    HEALTHY[name](VARIANTS[variant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", default="012")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    chosen = [int(letter) for letter in options.variants]
    warnings.simplefilter("ignore")
    cases = [(case, VARIANTS[i]) for case in CASES.values() for i in chosen]
    quiet = [partial(healthy, name, i) for name in HEALTHY for i in chosen]
    quiet += [partial(execute, case, VARIANTS[i], False) for case in CASES.values() for i in chosen]
    table = score(cases, quiet)
    print("\n".join(lines(table)))
    words = {
        "name": "accuracy",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "faults": len(CASES),
        "healthy": len(HEALTHY) + len(CASES),
        "variants": chosen,
        "table": table,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.json").write_text(json.dumps(words, indent=2) + "\n")


if __name__ == "__main__":
    main()
