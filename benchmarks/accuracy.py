"""Accuracy of diagnosis on the corpus of planted faults, beside anomaly mode, an is-finite mode and, where transformers
is installed, Hugging Face's DebugUnderflowOverflow (whose right answer is the module): a table and JSON.

``python benchmarks/accuracy.py [--variants 012] [--out benchmarks/results/accuracy-cpu-DATE.json]``
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
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
    today = f"accuracy-cpu-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / today)
    options = parser.parse_args()
    chosen = [int(letter) for letter in options.variants]
    warnings.simplefilter("ignore")
    cases = [(case, VARIANTS[i]) for case in CASES.values() for i in chosen]
    quiet = [partial(healthy, name, i) for name in HEALTHY for i in chosen]
    quiet += [partial(execute, case, VARIANTS[i], False) for case in CASES.values() for i in chosen]
    transformers = version("transformers") if find_spec("transformers") else None
    table = score(cases, quiet, modules=transformers is not None)
    print("\n".join(lines(table)))
    words = {
        "name": "accuracy",
        "torch": torch.__version__,
        "transformers": transformers,
        "python": platform.python_version(),
        "device": "cpu",
        "faults": len(CASES),
        "healthy": len(HEALTHY) + len(CASES),
        "variants": chosen,
        "table": table,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(words, indent=2) + "\n")


if __name__ == "__main__":
    main()
