"""Writes benchmark tables from results files of ``mlpkit bench``, so that no number is ever typed: that of README.md,
from the results of ``mlpkit bench population`` that of docs/population.md, from those of ``benchmarks/accuracy.py``
that of docs/trace.md.

python benchmarks/report.py benchmarks/results/cpu-2026-11-23.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, POPULATION, TRACE = ROOT / "README.md", ROOT / "docs" / "population.md", ROOT / "docs" / "trace.md"
BEGIN = "<!-- benchmark table: written by benchmarks/report.py -->"
END = "<!-- end of benchmark table -->"

FORWARD = "forward"  # all other passes train: forward + backward, or a whole training step
KINDS = {"layer": "Linear + GELU + dropout", "tiny": "Linear + GELU + dropout", "wide": "Linear + GELU + dropout"}
KINDS |= {"step": "training step"}
DTYPES = ("fp32", "bf16", "fp16")
POPULATION_RIVALS = ("stacked", "stacked, compiled", "vmap", "eager loop", "sklearn without dropout")


def ratio(row: dict[str, Any], rival: str | None = None) -> float:
    """How many times longer the rival (default: the row's baseline) took: the median of the rounds' own ratios."""
    value: float = row["ratio"][rival or row["baseline"]][row["clock"]]["median"]
    return value


def rows_of_table(results: dict[str, Any]) -> dict[tuple[str, str], dict[tuple[bool, str], dict[str, Any]]]:
    """(kind, sizes) -> (trains, dtype) -> row of the results, in the order of the file; ReLU stays in the JSON."""
    found: dict[tuple[str, str], dict[tuple[bool, str], dict[str, Any]]] = {}
    for row in results["cases"]:
        if row["family"] in KINDS and not row["label"].endswith(", relu"):
            key = KINDS[row["family"]], row["label"].removesuffix(", gelu")
            found.setdefault(key, {})[(row["what"] != FORWARD, row["dtype"])] = row
    return found


def table(results: dict[str, Any]) -> str:
    """One row a size, one column a pass and dtype: how many times faster than eager PyTorch."""
    found = rows_of_table(results)
    present = {column for rows in found.values() for column in rows}
    columns = [(trains, dtype) for dtype in DTYPES for trains in (False, True) if (trains, dtype) in present]
    names = [f"{dtype} {'training' if trains else 'forward'}" for trains, dtype in columns]
    lines = ["| | sizes | " + " | ".join([*names, "fp32 training: time", "of the floor"]) + " |"]
    lines.append("|---|---|" + "---:|" * (len(names) + 2))
    for (kind, sizes), rows in found.items():
        cells = [f"{ratio(rows[column]):.1f}x" if column in rows else "" for column in columns]
        cells += _absolute(rows.get((True, "fp32")))
        lines.append(f"| {kind} | {sizes} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *sentences(results)])


def _absolute(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["", ""]
    seconds = row["seconds"]["mlpkit"][row["clock"]]["median"]
    time = f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
    return [time, f"{100 * row['floor']['share']:.0f} %"]


def sentences(results: dict[str, Any]) -> list[str]:
    """What the columns mean, the conditions, and the families that are no ratio to eager."""
    facts, peak = results["environment"], results["peaks"].get("fp32")
    threads = f"{facts['threads']} thread" + ("s" if facts["threads"] > 1 else "")
    clock = "process CPU time" if facts["clock"] == "cpu" else "wall time"
    lines = [
        f"Times faster than eager PyTorch {facts['torch']} in the same run: "
        f"{facts['cpu']} ({facts['cpu_capability']}), {threads}, {clock}, "
        f"median of {facts['rounds']} interleaved rounds, {facts['date'][:10]}. "
        "Training is forward and backward of a layer, or a whole step with Adam and clipping."
    ]
    if peak:
        rate = f"{peak['flops_per_second'] / 1e9:.0f} GFLOP/s"
        lines.append(f"The floor is the matrix products alone at the {rate} that a probe reached in the same run.")
    of_family = {name: [row for row in results["cases"] if row["family"] == name] for name in ("dropout", "threads")}
    if of_family["dropout"]:
        costs = " to ".join(f"{cost:.2f}" for cost in _span([1 / ratio(row) for row in of_family["dropout"]]))
        lines.append(f"Dropout 0.1 takes {costs} times as long as p = 0.")
    if of_family["threads"]:
        shares = " to ".join(f"{100 * share:.0f}" for share in _span([row["of_probe"] for row in of_family["threads"]]))
        lines.append(f"A second thread brings {shares} % of what it brings to the probe.")
    return [" ".join([*lines, "More: [docs/bench.md](docs/bench.md)."])]


def population_table(results: dict[str, Any]) -> str:
    """One row a population, one column a rival: how many times longer it takes; then threads, fits and conditions."""
    rows = [row for row in results["cases"] if row["what"] == "training"]
    rivals = [name for name in POPULATION_RIVALS if any(name in row["ratio"] for row in rows)]
    lines = ["| population | " + " | ".join(rivals) + " | a step of a member | of the floor |"]
    lines.append("|---|" + "---:|" * (len(rivals) + 2))
    for row in rows:
        cells = [f"{ratio(row, name):.1f}x" if name in row["ratio"] else "" for name in rivals]
        cells += [f"{row['microseconds_a_step']:.1f} us", f"{100 * row['floor']['share']:.0f} %"]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    facts, peak = results["environment"], results["peaks"]["fp32"]
    said = [
        f"Times as long as ours, in the same run: PyTorch {facts['torch']}, {facts['cpu']} "
        f"({facts['cpu_capability']}), 1 thread, process CPU time, median of {facts['rounds']} interleaved rounds, "
        f"{facts['date'][:10]}. Dropout 0.1 and Adam everywhere, except that scikit-learn, batch by batch, has no "
        "dropout. The floor is the matrix products alone at the "
        f"{peak['flops_per_second'] / 1e9:.0f} GFLOP/s that a probe reached."
    ]
    for row in results["cases"]:
        if row["what"] == "two threads":
            said.append(
                f"Two threads bring {row['gain']:.2f} times the speed of one, {100 * row['of_probe']:.0f} % of what "
                "they bring to the probe."
            )
        if row["what"] == "fits":
            label = row["label"].removeprefix("fits of digits: ")
            loops = ", ".join(f"{ratio(row, name):.0f} times as many as by {name}" for name in row["ratio"])
            said.append(f"Whole fits of digits ({label}): {row['trials_a_minute, mlpkit']:,.0f} a CPU minute, {loops}.")
    return "\n".join([*lines, "", " ".join(said)])


ACCURACY = {  # heads of the table of accuracy: (what counts, of how many)
    "says something": ("fired", "failures"),
    "right op, phase and step": ("where", "failures"),
    "right cause": ("cause", "failures"),
    "silent failures explained": ("explained", "silent"),
    "false alarms": ("alarms", "healthy"),
}
TOOLS = {"mlpkit": "observe", "anomaly mode": "detect_anomaly", "is-finite mode": "isfinite mode"}


def accuracy_table(results: dict[str, Any]) -> str:
    """One row a tool: how many answers are right, and how many times longer a step takes under it."""
    measured = results.get("overhead", {"cases": []})["cases"]
    lines = ["| tool | " + " | ".join([*ACCURACY, *(f"{row['label']}: time of a step" for row in measured)]) + " |"]
    lines.append("|---|" + "---:|" * (len(ACCURACY) + len(measured)))
    for tool, row in results["table"].items():
        cells = [f"{row.get(what, 0)} of {row.get(of, 0)}" for what, of in ACCURACY.values()]
        cells += [_slower(case, TOOLS.get(tool, tool)) for case in measured]
        lines.append(f"| {tool} | " + " | ".join(cells) + " |")
    if measured:
        blank = "| " * len(ACCURACY)
        lines.append(f"| mlpkit, level watch | {blank}" + "| ".join(f"{_slower(row)} " for row in measured) + "|")
    said = (
        f"{results['faults']} programs with a planted fault and {results['healthy']} healthy ones (tests/corpus, which "
        "the tracer grew up with), "
        f"{len(results['variants'])} variants of each (other sizes, nesting, seed, loss); torch {results['torch']}. "
        "A right answer of detect_anomaly is the operation's node, of an is-finite mode the first operation with NaN "
        "or Inf, of DebugUnderflowOverflow the module."
    )
    if measured:
        facts = results["overhead"]["environment"]
        said += f" Times over the plain loop's: {facts['cpu']}, 1 thread, process CPU time, median of {facts['rounds']}"
        said += f" interleaved rounds, {facts['date'][:10]}; entering and leaving the tool is part of them."
    return "\n".join([*lines, "", said])


def _slower(row: dict[str, Any], tool: str = "mlpkit") -> str:
    """How many times longer a step takes under a tool; ratios of a row are over watch."""
    if tool != "mlpkit" and tool not in row["ratio"]:
        return ""
    return f"{(1.0 if tool == 'mlpkit' else ratio(row, tool)) / ratio(row, 'eager'):.2f}x"


def _span(values: list[float]) -> list[float]:
    return sorted({min(values), max(values)})


def write(readme: Path, text: str) -> None:
    """Put ``text`` between the markers of the file."""
    head, rest = readme.read_text().split(BEGIN)
    _, tail = rest.split(END)
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    if results.get("name") == "accuracy":
        return write(TRACE, accuracy_table(results))
    if results["environment"]["quick"]:
        sys.exit(f"benchmarks/report.py: {args.results} comes from --quick; its figures say nothing")
    if {row["family"] for row in results["cases"]} == {"population"}:
        write(POPULATION, population_table(results))
    else:
        write(README, table(results))


if __name__ == "__main__":
    main()
