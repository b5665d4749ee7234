"""The page of results, made of the newest files in benchmarks/results: goals and misses, charts, tables.

mkdocs calls this as a hook; no figure of the page is typed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
Results = dict[str, Any]

# How a file's name begins: the heading over it.
FILES = {"cpu": "Layers and steps on the CPU", "population-cpu": "Populations on the CPU"}
WIDTH, LEFT, RIGHT, LINE = 760, 330, 60, 22


class Goal(NamedTuple):
    """What a row is to reach: the rows whose facts hold these words, against this rival, at least ``least`` times."""

    file: str
    family: str
    label: str
    what: str
    dtype: str
    rival: str
    least: float


# What the project set out to reach, on two cores of a server; misses are shown as well.
BOTH = "forward + backward"
GOALS = [
    *(Goal("cpu", "layer", f"1024 x 128 -> {n}, gelu", "forward", "fp32", "eager", 2.8) for n in (256, 4096)),
    *(Goal("cpu", "layer", f"1024 x 128 -> {n}, gelu", "forward", "fp32", "mm", 1 / 1.2) for n in (256, 4096)),
    *(Goal("cpu", "layer", f"1024 x 128 -> {n}, gelu", BOTH, "fp32", "eager", 2.3) for n in (256, 4096)),
    *(Goal("cpu", "layer", f"1024 x 128 -> {n}, gelu", BOTH, "bf16", "eager", 2.2) for n in (256, 4096)),
    Goal("cpu", "layer", "1024 x 128 -> 256, gelu", BOTH, "fp16", "eager", 14),
    Goal("cpu", "wide", "512 x 1024 -> 1024, gelu", BOTH, "fp32", "eager", 1.2),
    Goal("cpu", "wide", "256 x 4096 -> 4096, gelu", BOTH, "fp32", "eager", 1.15),
    Goal("cpu", "tiny", "32 x 128 -> 64, gelu", BOTH, "fp32", "eager", 1.5),
    *(
        Goal("cpu", "step", f"128 -> {w} -> {w} -> 10, batch {rows}", "training step", "fp32", "eager", least)
        for rows, goals in ((32, {16: 35, 64: 15, 256: 2.8}), (256, {16: 13, 64: 5, 256: 2.2}))
        for w, least in goals.items()
    ),
    *(
        Goal("cpu", "step", f"128 -> {w} -> {w} -> 10, batch 256", "training step", "bf16", "mlpkit fp32", 1.6)
        for w in (128, 256)
    ),
    Goal("cpu", "update", "25k parameters", "after backward", "fp32", "torch", 12),
    Goal("cpu", "update", "16.8M parameters", "after backward", "fp32", "torch", 1.6),
    Goal("cpu", "guard", "transformer encoder", "training step", "fp32", "eager", 1 / 1.03),
    Goal("cpu", "census", "16777216 elements", "census", "fp32", "isfinite", 15),
    Goal("cpu", "census", "16777216 elements", "census", "fp32", "aminmax", 1 / 1.5),
    *(
        Goal("population-cpu", "population", f"w = {w}, batch 32", "training", "fp32", "stacked", least)
        for w, least in {16: 7, 64: 4.5, 256: 2.2}.items()
    ),
    Goal("population-cpu", "population", "w = 16, batch 32", "training", "fp32", "eager loop", 40),
    Goal("population-cpu", "population", "w = 16, batch 32", "training", "fp32", "sklearn without dropout", 40),
    Goal("population-cpu", "population", "mixed widths", "training", "fp32", "stacked", 6),
    Goal("population-cpu", "population", "fits of digits", "fits", "fp32", "DataLoader loop", 20),
    Goal("population-cpu", "population", "fits of digits", "fits", "fp32", "sklearn without dropout and validation", 6),
]  # fmt: skip


def newest(prefix: str) -> Path | None:
    """The latest file of a kind, by the date in its name."""
    found = sorted(RESULTS.glob(f"{prefix}-[0-9]*.json"))
    return found[-1] if found else None


def ratio(row: Row, rival: str) -> float:
    """The rival's time over ours: the median of the rounds' own ratios."""
    value: float = row["ratio"][rival][row["clock"]]["median"]
    return value


def conditions(results: Results, path: Path) -> str:
    """What was measured where and when, in a sentence or two."""
    facts = results["environment"]
    rivals = ", ".join(f"{name} {version}" for name, version in facts["rivals"].items())
    clock = "process CPU time" if facts["clock"] == "cpu" else "wall time"
    peaks = ", ".join(f"{name} {peak['flops_per_second'] / 1e9:.0f}" for name, peak in results["peaks"].items())
    return (
        f"mlpkit {facts['mlpkit']} at commit `{str(facts['commit'])[:8]}`, {facts['date'][:10]}; {rivals}; Python "
        f"{facts['python']}; {facts['cpu']} ({facts['cpu_capability']}), {facts['cores']} cores, {facts['threads']} "
        f"thread{'s' if facts['threads'] > 1 else ''}, load {facts['load']:g} before and "
        f"{facts['load_after']:g} after; {clock}, {facts['rounds']} interleaved rounds. "
        f"Peaks that a probe reached, GFLOP/s a thread: {peaks}. "
        f"All of it: `{path.relative_to(ROOT)}`."
    )


def chart(rows: list[Row]) -> str:
    """Bars of the baseline's time over ours, on a logarithmic scale that begins at half."""
    values = [ratio(row, row["baseline"]) for row in rows]
    low, high = math.log(min(0.5, *values)), math.log(max(4.0, *values))
    room = WIDTH - LEFT - RIGHT

    def place(value: float) -> float:
        return LEFT + room * (math.log(value) - low) / (high - low)

    height = LINE * len(rows) + 26
    alt = f"Times as long as mlpkit, by row: from {min(values):.2f} to {max(values):.2f}"
    parts = [f'<svg class="diagram bars" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alt)}">']
    for at, (row, value) in enumerate(zip(rows, values)):
        name = escape(f"{row['label'].removesuffix(', gelu')}, {row['what']}, {row['dtype']}")
        top = LINE * at + 4
        begin, end = sorted((place(1.0), place(value)))
        kind = "slower" if value < 1 else "faster"
        parts.append(f'<text x="{LEFT - 8}" y="{top + 13}" text-anchor="end">{name}</text>')
        parts.append(
            f'<rect class="{kind}" x="{begin:.1f}" y="{top}" width="{max(end - begin, 1):.1f}" height="{LINE - 6}"/>'
        )
        parts.append(f'<text x="{max(end, place(1.0)) + 5:.1f}" y="{top + 13}">{value:.2f}x</text>')
    parts.append(f'<line x1="{place(1.0):.1f}" y1="0" x2="{place(1.0):.1f}" y2="{height - 22}"/>')
    parts.append(f'<text x="{place(1.0):.1f}" y="{height - 6}" text-anchor="middle">as long as mlpkit</text></svg>')
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    """Every rival of every row, our time and the share of the floor."""
    rivals = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    lines = ["| sizes | pass | dtype | " + " | ".join(rivals) + " | our time, us | of the floor |"]
    lines.append("|---|---|---|" + "---:|" * (len(rivals) + 2))
    for row in rows:
        cells = [f"{ratio(row, name):.2f}x" if name in row["ratio"] else "" for name in rivals]
        time = 1e6 * row["seconds"]["mlpkit"][row["clock"]]["median"]
        cells.append(f"{time:,.0f}" if time >= 100 else f"{time:.1f}")
        cells.append(f"{100 * row['floor']['share']:.0f} %" if "floor" in row else "")
        lines.append(f"| {row['label']} | {row['what']} | {row['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _matches(row: Row, goal: Goal) -> bool:
    same = (row["family"], row["what"], row["dtype"]) == (goal.family, goal.what, goal.dtype)
    return same and goal.label in row["label"] and goal.rival in row["ratio"]


def goals(found: dict[str, Results]) -> Iterator[tuple[Goal, float]]:
    """Each goal that a file has a row for, and what was reached."""
    for goal in GOALS:
        for row in found.get(goal.file, {}).get("cases", []):
            if _matches(row, goal):
                yield goal, ratio(row, goal.rival)
                break


def goals_table(found: dict[str, Results]) -> str:
    """Misses first."""
    lines = ["| | pass | dtype | against | goal | reached | |", "|---|---|---|---|---:|---:|---|"]
    for goal, value in sorted(goals(found), key=lambda pair: pair[1] >= pair[0].least):
        met = "met" if value >= goal.least else "**missed**"
        lines.append(
            f"| {goal.label} | {goal.what} | {goal.dtype} | {goal.rival} | {goal.least:.2f}x | {value:.2f}x | {met} |"
        )
    return "\n".join(lines)


def page() -> str:
    """The whole page in Markdown."""
    paths = {name: path for name in FILES if (path := newest(name)) is not None}
    found = {name: json.loads(path.read_text()) for name, path in paths.items()}
    reached = list(goals(found))
    missed = sum(value < goal.least for goal, value in reached)
    parts = [
        "# Results\n",
        "Each figure is how many times longer a rival took than mlpkit in the same interleaved run: above 1, mlpkit is "
        "faster. [How a figure is made and read](bench.md). A figure holds for the machine it was measured on; on "
        "yours, `mlpkit bench` says. No figure of a GPU stands here until one has been measured.\n",
        f"## Goals\n\n{len(reached) - missed} of {len(reached)} met, {missed} missed.\n\n{goals_table(found)}\n",
    ]
    for name, results in found.items():
        parts.append(f"## {FILES[name]}\n\n{conditions(results, paths[name])}\n")
        for family in dict.fromkeys(row["family"] for row in results["cases"]):
            rows = [row for row in results["cases"] if row["family"] == family and row["ratio"]]
            if rows:
                parts.append(f"### {family}\n\nAgainst {rows[0]['baseline']}:\n\n{chart(rows)}\n\n{table(rows)}\n")
    return "\n".join(parts)


def on_config(config: Any) -> Any:
    """Put the page into the navigation."""
    for entry in config["nav"]:
        for part in entry.get("Guides", []):
            if "Results" in part:
                part["Results"] = "results.md"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make the page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "results.md", content=page()))
    return files
