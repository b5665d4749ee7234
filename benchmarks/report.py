"""Writes the benchmark table of README.md from a results file, so that no number is ever typed.

python benchmarks/report.py benchmarks/results/cpu-2026-11-22.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- benchmark table: written by benchmarks/report.py -->"
END = "<!-- end of benchmark table -->"


def table(results: dict[str, Any]) -> str:
    """One row a shape, one column a dtype and pass: how many times faster than eager PyTorch."""
    environment, cases = results["environment"], results["cases"]
    columns = sorted(
        {(case["dtype"], case["pass"]) for case in cases}, key=lambda c: (c[0] != "fp32", c[0], c[1] != "fwd")
    )
    ratios = {(tuple(case["shape"]), case["dtype"], case["pass"]): case["ratio"]["eager"] for case in cases}
    lines = [
        "| Linear + "
        + environment["activation"].upper()
        + f" + dropout {environment['p']}, rows x in -> out | "
        + " | ".join(f"{dtype} {name}" for dtype, name in columns)
        + " |",
        "|---|" + "---|" * len(columns),
    ]
    for shape in dict.fromkeys(tuple(case["shape"]) for case in cases):
        cells = [f"{ratios[(shape, dtype, name)]:.2f}x" for dtype, name in columns]
        lines.append(f"| {shape[0]} x {shape[1]} -> {shape[2]} | " + " | ".join(cells) + " |")
    threads = f"{environment['threads']} thread" + ("s" if environment["threads"] > 1 else "")
    lines.append("")
    lines.append(
        f"Speed over eager PyTorch {environment['torch']} in the same run: {environment['cpu']} "
        f"({environment['cpu_capability']}), {threads}, median of {environment['rounds']} interleaved rounds, "
        f"{environment['date'][:10]}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    README.write_text(f"{head}{BEGIN}\n{table(json.loads(args.results.read_text()))}\n{END}{tail}")


if __name__ == "__main__":
    main()
