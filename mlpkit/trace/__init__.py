"""Find the first operation that went wrong, and why: ``Tracer`` around any training code, ``census`` of one tensor."""

from __future__ import annotations

from mlpkit.ops.census import Census, census
from mlpkit.trace._diagnosis import Diagnosis
from mlpkit.trace._replay import Replay, replay
from mlpkit.trace._tracer import Tracer

__all__ = ["Census", "Diagnosis", "Replay", "Tracer", "census", "replay"]
