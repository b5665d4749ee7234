"""Proposals: what to change so that a cause goes away. ``verified`` stays None until a re-run has shown it."""

from __future__ import annotations

from typing import Any

from mlpkit.trace._numbers import short
from mlpkit.trace._records import Incident

_LOW = ("float16", "bfloat16")
# (kind, text) by cause; the first that fits the operation comes first.
_BY_CAUSE: dict[str, tuple[str, str]] = {
    "cast_overflow": ("keep_fp32", "keep this tensor in float32, scale it down before the cast, or cast to bfloat16"),
    "division_by_zero": (
        "safe_where",
        "divide by x.clamp_min(eps), or replace the divisor first: x / where(d == 0, 1, d)",
    ),
    "zero_over_zero": ("safe_where", "replace the divisor before dividing: n / where(d == 0, 1, d)"),
    "inf_minus_inf": (
        "mask_finite",
        "mask with torch.finfo(dtype).min / 2 in place of -inf, and keep one key open per row",
    ),
    "zero_times_inf": (
        "safe_where",
        "make the input safe before the function, f(where(ok, x, 1)); a where() after it keeps 0 * Inf in backward",
    ),
    "inf_over_inf": ("log_domain", "work in the log domain: torch.log_softmax, torch.logsumexp, torch.softmax"),
    "log_of_zero": (
        "clamp",
        "log(x.clamp_min(torch.finfo(x.dtype).tiny)), torch.xlogy(x, y) for x log y, or log_softmax",
    ),
    "sqrt_of_negative": ("clamp", "sqrt(x.clamp_min(0)): rounding can make a variance slightly negative"),
    "domain": ("clamp", "clamp the argument to the domain of this function"),
    "empty_reduction": ("guard_count", "skip the batch, or divide the sum by max(count, 1)"),
    "external": ("check_input", "check the data, parameter or checkpoint where it is loaded: torch.isfinite(x).all()"),
    "explosion": (
        "init",
        "scale the initial weights (mlpkit.init, Xavier or He) or add a normalisation between the layers",
    ),
}


def proposals(incident: Incident) -> list[dict[str, Any]]:
    """What to try, best first."""
    cause = incident.root_cause or incident.finding.cause
    found: list[tuple[str, str]] = []
    if incident.still:
        return _listed([_standstill(incident)])
    if "_norm" in incident.record.op and cause == "zero_over_zero":
        found.append(("eps", "give the normalisation an eps above 0, such as 1e-5"))
    if cause in ("zero_times_inf", "inf_over_inf") and incident.root_text:
        found.append(_BY_CAUSE["inf_minus_inf"])
    if cause == "hyperparameter":
        found.append(_hyperparameter(incident))
    elif cause == "overflow":
        found.extend(_overflow(incident))
    elif cause == "underflow":
        found.extend(_underflow(incident))
    elif incident.record.op in ("_softmax", "div", "log") and cause in ("log_of_zero", "inf_over_inf"):
        found.append(_BY_CAUSE["inf_over_inf"])
    if cause in _BY_CAUSE:
        found.append(_BY_CAUSE[cause])
    return _listed(found)


def _listed(found: list[tuple[str, str]]) -> list[dict[str, Any]]:
    unique = dict(found)
    return [{"kind": kind, "text": text, "verified": None} for kind, text in unique.items()]


def _standstill(incident: Incident) -> tuple[str, str]:
    """For parameters that stopped learning without a NaN."""
    record, cause = incident.record, incident.root_cause or incident.finding.cause
    if cause == "hyperparameter":
        return "lower_lr", "lower the learning rate, or clip the gradient norm: one update threw the parameters too far"
    if "norm" in record.op and record.place.phase == "optimizer":
        return "clip", "take the gradient norm in float64, as mlpkit.guard does, or scale the loss down"
    if cause == "overflow":
        return "upcast", f"keep {record.op} within its range: scale its operands down, or compute it in a wider dtype"
    if cause == "underflow" and record.place.phase == "optimizer":
        return "keep_fp32", "keep float32 parameters (autocast instead of .half()), or raise the learning rate"
    if cause == "underflow" and record.dtype in _LOW and record.place.phase == "backward":
        return "scale_loss", "scale the loss (torch.amp.GradScaler or mlpkit.guard), or use bfloat16"
    if cause == "underflow":
        return (
            "scale",
            "bring its operands nearer to 0: smaller weights, a normalisation before it, or a loss on logits",
        )
    if cause == "external":
        return "init", f"start where {record.op} has a slope: other biases or weights, leaky_relu, wider bounds"
    return _BY_CAUSE.get(cause, ("check_input", f"look at what {record.op} is given"))


def _hyperparameter(incident: Incident) -> tuple[str, str]:
    if incident.finding.cause == "hyperparameter":
        return "hyperparameter", "give the optimizer finite settings: " + incident.finding.text
    return (
        "lower_lr",
        f"lower the learning rate: {incident.root_text}; clip the gradient norm if single batches do this",
    )


def _overflow(incident: Incident) -> list[tuple[str, str]]:
    record = incident.record
    found = []
    if record.op in ("exp", "expm1", "exp2", "pow"):
        found.append(("log_domain", "subtract the maximum before exp, or use torch.softmax / torch.logsumexp"))
    if record.dtype in _LOW:
        found.append(("upcast", f"run {record.op} in float32 (torch.autocast(enabled=False)) or use bfloat16"))
        found.append(
            ("scale", "scale its operands down: smaller initial weights, a normalisation before it, 1/sqrt(n)")
        )
    elif not found:
        found.append(("clip", f"clip its operands: the result passes {short(incident.finding.limit or 0.0)}"))
    return found


def _underflow(incident: Incident) -> list[tuple[str, str]]:
    root = incident.root
    dtype = root.dtype if root is not None else "float32"
    found = []
    if root is not None and root.op in ("_softmax", "exp", "sigmoid"):
        found.append(("log_domain", "use log_softmax / logsigmoid / logsumexp: the log is exact where the exp is 0"))
    found.append(("eps", f"use an eps that {dtype} can hold, at least {short(_tiny(dtype))}"))
    if dtype in _LOW:
        found.append(("upcast", "keep this operation in float32"))
    return found


def _tiny(dtype: str) -> float:
    return {"float16": 6.2e-5, "bfloat16": 1.2e-38, "float32": 1.2e-38}.get(dtype, 2.3e-308)
