"""What the tracer remembers: one record per operation, findings about bad elements, incidents and where they went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlpkit.trace._capture import Capture


class Scan(NamedTuple):
    """The part of a census that the tracer works with; ``first_bad`` is a flat index or -1."""

    nan: int
    posinf: int
    neginf: int
    zero: int
    absmax: float
    first_bad: int

    @property
    def bad(self) -> bool:
        """Holds NaN or Inf."""
        return self.nan + self.posinf + self.neginf > 0


class Place(NamedTuple):
    """Where in the program an operation ran."""

    step: int
    phase: str  # "forward", "backward", "optimizer" or "source"
    module: str
    file: str
    line: int
    node: str

    @property
    def location(self) -> str:
        """``file:line`` in user code, relative to the working directory where it lies inside."""
        return f"{self.file}:{self.line}" if self.file else ""


@dataclass(slots=True)
class Finding:
    """Why one element of one result is NaN or Inf (or was rounded to zero)."""

    cause: str
    value: str  # "NaN", "Inf", "-Inf" or "0"
    text: str
    index: list[int] = field(default_factory=list)
    operands: dict[str, float] = field(default_factory=dict)
    exact: float | None = None
    limit: float | None = None
    shape: list[int] = field(default_factory=list)
    capture: Capture | None = None  # what the operation was given


@dataclass(slots=True, eq=False)
class OpRecord:
    """One operation that ran, or one tensor that came from outside (``op`` is then ``input`` or ``param``)."""

    index: int
    op: str
    dtype: str
    place: Place
    parents: tuple[OpRecord, ...] = ()
    zero: int = 0
    nothing: bool = False  # the (first) result holds zeros only
    absmax: float = 0.0
    multiplied: float | None = None  # magnitude of the number that a loss scale multiplied
    value: str = ""  # "", "NaN", "Inf" or "-Inf": the worst that the result holds
    subject: str = ""  # name of the parameter, buffer or input this record stands for or wrote to
    consumed: bool = False
    derived: bool = False  # computed by the model, from parameters or in an update; otherwise data
    incident: Incident | None = None
    bad_parent: OpRecord | None = None
    finding: Finding | None = None
    underflow: Finding | None = None
    flat: bool = False  # a gradient of zeros because the activation is flat there, everywhere

    def forget(self) -> None:
        """Let go of older records; names and numbers stay."""
        self.parents = ()
        self.bad_parent = None


@dataclass(slots=True)
class Link:
    """One element of a diagnosis chain."""

    step: int
    phase: str
    op: str
    module: str
    stage: str
    cause: str
    detail: str


@dataclass(slots=True)
class Sink:
    """A place where a non-finite value mattered."""

    kind: str  # "loss", "parameter", "buffer", "optimizer state", "gradient", "returned value" or "standstill"
    name: str
    place: Place
    op: str


@dataclass(slots=True, eq=False)
class Incident:
    """One birth of NaN or Inf and all that descends from it."""

    record: OpRecord
    finding: Finding
    intended: bool = False
    root: OpRecord | None = None  # an earlier, finite operation to blame (underflow)
    root_cause: str = ""
    root_text: str = ""
    links: list[Link] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    history: list[tuple[int, float]] = field(default_factory=list)
    scale: float | None = None  # the loss scale at which a scaler found it
    calibration: bool = False
    skipped: bool = False
    saved: int = 0
    repeats: int = 1
    listed: bool = False
    still: str = ""  # which parameters it keeps from learning, where no NaN tells

    @property
    def live(self) -> bool:
        """It reached something that counts."""
        return bool(self.sinks) and not self.calibration
