"""Diagnosis beside anomaly mode, an is-finite mode and, where transformers is installed, Hugging Face's
DebugUnderflowOverflow (whose right answer is the module): accuracy on the corpus of planted faults, false alarms on
healthy programs, and what it costs to be traced. A table and JSON.

``python benchmarks/accuracy.py [--variants 012] [--out FILE] [--part accuracy|overhead]``

The file is written after every program; the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from corpus import CASES, HEALTHY, VARIANTS, execute
from corpus.scorecard import alarms, answers, lines, table_of

from mlpkit.bench import Settings
from mlpkit.bench.cases import trace
from mlpkit.bench.machine import environment
from mlpkit.bench.peak import Peaks
from mlpkit.bench.runner import row
from mlpkit.report import write_whole

Answers = dict[str, list[str]]


def healthy(name: str, variant: int) -> None:
    torch.manual_seed(VARIANTS[variant].seed)
    HEALTHY[name](VARIANTS[variant])


def programs(chosen: list[int], modules: bool) -> Iterator[tuple[str, Callable[[], Answers]]]:
    """All programs by name: planted faults, the same without their fault, and healthy ones."""
    for i in chosen:
        for name, case in CASES.items():
            yield f"{name} {i}", partial(answers, case, VARIANTS[i], modules=modules)
            whole = partial(execute, case, VARIANTS[i], False)
            yield f"{name} {i} without the fault", partial(alarms, whole, modules=modules)
        for name in HEALTHY:
            yield f"{name} {i} healthy", partial(alarms, partial(healthy, name, i), modules=modules)


def score(results: dict[str, Any], chosen: list[int], out: Path) -> None:
    """Ask every tool about every program that the file does not hold yet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = results.setdefault("programs", {})
    for name, ask in programs(chosen, results["transformers"] is not None):
        if name not in done:
            done[name] = ask()
            results["table"] = table_of(done.values())
            write_whole(out, json.dumps(results, indent=1) + "\n")
    print("\n".join(lines(results["table"])))


def overhead(results: dict[str, Any], out: Path) -> None:
    """Training steps under each tool, over the plain loop's: the median of the rounds' own ratios."""
    torch.set_num_threads(1)
    settings = Settings(threads=1, rounds=9)
    done = results.setdefault("overhead", {"environment": environment(settings), "cases": []})
    labels = {found["label"] for found in done["cases"]}
    peaks = Peaks(settings)
    for case in trace.cases(settings, peaks):
        if case.label in labels:
            continue
        found = row(case, settings, peaks)
        done["cases"].append(found)
        write_whole(out, json.dumps(results, indent=1) + "\n")
        ours, eager = (found["ratio"][name][found["clock"]]["median"] for name in ("observe", "eager"))
        print(f"{case.label}: watch {1 / eager:.2f}, observe {ours / eager:.2f} times the plain loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="012")
    today = f"accuracy-cpu-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / today)
    parser.add_argument("--part", choices=("accuracy", "overhead"), help="default: both")
    options = parser.parse_args()
    chosen = [int(letter) for letter in options.variants]
    facts = {
        "name": "accuracy",
        "torch": torch.__version__,
        "transformers": version("transformers") if find_spec("transformers") else None,
        "python": platform.python_version(),
        "device": "cpu",
        "faults": len(CASES),
        "healthy": len(HEALTHY) + len(CASES),
        "variants": chosen,
    }
    results = json.loads(options.out.read_text()) if options.out.exists() else dict(facts)
    if {name: results.get(name) for name in facts} != facts:
        sys.exit(f"benchmarks/accuracy.py: {options.out} was made with other versions or options; name another --out")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.part != "overhead":
        score(results, chosen, options.out)
    if options.part != "accuracy":
        overhead(results, options.out)


if __name__ == "__main__":
    main()
