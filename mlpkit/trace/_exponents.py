"""Histograms of exponents: what the operation that went wrong was given, and what it gave."""

from __future__ import annotations

from typing import Any

import torch

from mlpkit.ops.census import LOWEST_EXPONENT, census
from mlpkit.report import Figure, Section, Table
from mlpkit.trace._capture import Capture
from mlpkit.trace._intercept import is_plain

_MOST = 4  # operands shown
_COLOURS = ("var(--accent)", "var(--second)", "var(--quiet)", "var(--good)", "var(--bad)")


def exponents(capture: Capture) -> Section:
    """A section with one set of bars for each operand and for the first result."""
    named = [(f"operand {i + 1}", tensor) for i, tensor in enumerate(_tensors(capture, capture.args)[:_MOST])]
    named += [("result", tensor) for tensor in _tensors(capture, capture.results)[:1]]
    bars: list[dict[str, Any]] = []
    rows = []
    for (label, tensor), colour in zip(named, _COLOURS):
        found = census(tensor, histogram=True)
        counts = list(found.histogram or ())
        bars.append(
            {
                "type": "bar",
                "name": f"{label} ({found.dtype})",
                "x": [LOWEST_EXPONENT + i for i in range(len(counts))],
                "y": counts,
                "marker": {"color": colour},
            }
        )
        rows.append((label, str(found)))
    layout = {
        "barmode": "group",
        "xaxis": {"title": {"text": "exponent, floor(log2 |x|)"}},
        "yaxis": {"title": {"text": "elements"}},
    }
    alt = f"Exponents of {len(named)} tensors: the operands of the operation and its result."
    table = Table(("tensor", "census"), rows)
    caption = "float16 ends at 15, float32 and bfloat16 at 127; NaN, Inf and 0 have no bar."
    return Section(
        "Exponents",
        [Figure("Exponents", {"data": bars, "layout": layout}, alt, caption, table)],
        "Before and after the operation.",
    )


def _tensors(capture: Capture, tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, list):
        return [tensor for item in tree for tensor in _tensors(capture, item)]
    if isinstance(tree, dict) and isinstance(tree.get("tensor"), str):
        tensor = capture.tensors[tree["tensor"]]
        return [tensor] if is_plain(tensor) and tensor.numel() else []
    return []
