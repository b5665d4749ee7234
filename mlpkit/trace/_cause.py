"""Why is this element NaN or Inf: the operands of the first bad element, its exact value, the rule that was met."""

from __future__ import annotations

import math

import torch

from mlpkit.trace import _rules, _shadow
from mlpkit.trace._intercept import OpCall
from mlpkit.trace._numbers import limit, short
from mlpkit.trace._records import Finding

_CASTS = frozenset({"_to_copy", "copy_", "to", "_to_copy_"})
_NORMALISATIONS = ("layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm")
_AVERAGES = frozenset({"mean", "var", "std", "var_mean", "std_mean", "nll_loss_forward", "nll_loss2d_forward"})
_NEVER_ZERO = frozenset({"exp", "exp2", "sigmoid", "_softmax"})
_MULTIPLYING = ("convolution", "backward", "bmm", "mm", "dropout", "scaled_dot_product", "mul")


def explain(call: OpCall, tensor: torch.Tensor, which: int, output: int, *, nan: bool) -> Finding:
    """The finding for the first NaN (or, with ``nan`` false, the first NaN or Inf) of one result."""
    index = first_bad(tensor, nan=nan)
    value = float(tensor.detach()[tuple(index)]) if index else float(tensor.detach())
    dtype = str(tensor.dtype).removeprefix("torch.")
    finding = Finding("", short(value), "", index, limit=limit(dtype), shape=list(tensor.shape))
    base = _shadow.base_name(call.name)
    if _shadow.is_elementwise(call):
        finding.operands = _shadow.operands_at(call, which, index, tensor.shape)
    finding.exact = _shadow.exact(call, which, output, index, tensor.shape)
    answer = _scalar_answer(call, which) or _answer(call, base, value, finding)
    finding.cause, finding.text = answer
    return finding


def first_bad(tensor: torch.Tensor, *, nan: bool) -> list[int]:
    """Index of the first NaN, or of the first NaN or Inf."""
    flat = tensor.detach().reshape(-1)
    bad = torch.isnan(flat) if nan else ~torch.isfinite(flat)
    position = int(bad.to(torch.uint8).argmax())
    return [int(part) for part in torch.unravel_index(torch.tensor(position), tensor.shape)] if tensor.dim() else []


def _scalar_answer(call: OpCall, which: int) -> tuple[str, str] | None:
    bad = [value for value in _shadow.scalars(call, which) if not math.isfinite(value)]
    return ("hyperparameter", f"the number {short(bad[0])} was passed in") if bad else None


def _answer(call: OpCall, base: str, value: float, finding: Finding) -> tuple[str, str]:
    bound = finding.limit or math.inf
    finite_inputs = all(bool(torch.isfinite(call.before(tensor)).all()) for tensor in call.reads)
    if call.name in _CASTS:
        exact = finding.exact if finding.exact is not None else math.nan
        return "cast_overflow", f"{short(exact)} {_compare(exact, bound)}"
    if _shadow.is_elementwise(call):
        answer = _rules.judge(base, finding.operands)
        if answer:
            return answer
    product = _shadow.terms(call, finding.index)
    if product is not None:
        return _matrix_product(product, finding, bound)
    if base in _AVERAGES and (empty := _empty(call, base)):
        return empty
    if finite_inputs:
        if any(name in base for name in _NORMALISATIONS) and _shadow.arguments(call).get("eps") == 0:
            return "zero_over_zero", "the variance is 0 and so is eps"
        if "batch_norm" in base and math.isnan(value) and not math.isfinite(finding.exact or math.nan):
            return "sqrt_of_negative", "the running variance is negative"
        return _finite_inputs(finding, bound, value)
    return _infinite_inputs(call, base)


def _finite_inputs(finding: Finding, bound: float, value: float) -> tuple[str, str]:
    exact = finding.exact
    if exact is not None and math.isfinite(exact):
        if abs(exact) > bound:
            return "overflow", f"exact result {short(exact)} {_compare(exact, bound)}"
        return "overflow", f"an intermediate value passed {short(bound)} (exact result {short(exact)})"
    if math.isnan(value):
        return "domain", "the result is not a number"
    return "overflow", f"the result passed {short(bound)}"


def _infinite_inputs(call: OpCall, base: str) -> tuple[str, str]:
    if "rms_norm" in base:
        return "zero_times_inf", "Inf * (1 / Inf) while normalising an Inf"
    if any(name in base for name in _NORMALISATIONS) and "backward" not in base:
        return "inf_minus_inf", "Inf - Inf while the mean is subtracted"
    if base in ("_softmax", "_log_softmax", "logsumexp"):
        return "inf_minus_inf", "Inf - Inf while the maximum is subtracted"
    if "scaled_dot_product" in base:
        return "inf_minus_inf", "Inf - Inf while the maximum of the scores is subtracted"
    if any(name in base for name in _MULTIPLYING):
        zeros = any(bool((call.before(tensor) == 0).any()) for tensor in call.reads)
        if zeros:
            return "zero_times_inf", "0 * Inf inside"
    return "inf_minus_inf", "Inf - Inf inside"


def _matrix_product(product: _shadow.Terms, finding: Finding, bound: float) -> tuple[str, str]:
    left, right = product.left, product.right
    values = left * right
    largest = int(torch.nan_to_num(values.abs(), nan=math.inf).argmax()) if values.numel() else 0
    if values.numel():
        finding.operands = {"left": float(left[largest]), "right": float(right[largest]), "added": product.added}
    if bool(values.isnan().any()):
        return "zero_times_inf", "0 * Inf inside the sum of products"
    if not bool(torch.isfinite(values).all()) or math.isinf(product.added):
        return "inf_minus_inf", "Inf - Inf inside the sum of products"
    exact = finding.exact
    if exact is not None and abs(exact) > bound:
        return "overflow", f"exact result {short(exact)} {_compare(exact, bound)}"
    return "overflow", f"a partial sum passed {short(bound)} (exact result {short(exact or 0.0)})"


def _empty(call: OpCall, base: str) -> tuple[str, str] | None:
    named = _shadow.arguments(call)
    source = named.get("self")
    if not isinstance(source, torch.Tensor):
        return None
    if base.startswith("nll_loss"):
        ignored = named["target"] == named.get("ignore_index", -100)
        if bool(ignored.all()):
            return "empty_reduction", "mean over 0 targets: every one is ignored"
        weight = named.get("weight")
        if isinstance(weight, torch.Tensor) and not bool(weight[named["target"][~ignored]].any()):
            return "zero_over_zero", "the weights of all targets sum to 0"
        return None
    dims = named.get("dim")
    lengths = [source.shape[dim] for dim in dims] if dims else list(source.shape)
    count = math.prod(lengths)
    if count == 0:
        return "empty_reduction", f"{base} over 0 elements"
    correction = named.get("correction", named.get("unbiased", 1))
    if base != "mean" and count <= float(1 if correction is None else correction):
        return "empty_reduction", f"{base} over {count} element with correction {short(float(correction or 1))}"
    return None


def _compare(value: float, bound: float) -> str:
    return f"> {short(bound)}" if value > 0 else f"< -{short(bound)}"


def rounded_to_zero(call: OpCall, tensor: torch.Tensor, which: int) -> Finding | None:
    """The first element that is 0 in the result and is not 0 exactly, for the operations where that is asked."""
    results = _shadow.whole(call)
    if which >= len(results) or results[which].shape != tensor.shape:
        return None
    zeros, wide = (tensor.detach() == 0).reshape(-1), results[which]
    lost = zeros & (wide.reshape(-1) != 0) & torch.isfinite(wide.reshape(-1))
    source = _shadow.arguments(call).get("self")
    if (
        _shadow.base_name(call.name) in _NEVER_ZERO
        and isinstance(source, torch.Tensor)
        and source.shape == tensor.shape
    ):
        lost = zeros & torch.isfinite(call.before(source)).reshape(-1)  # fp64 may round it to 0 as well
    if not bool(lost.any()):
        return None
    position = int(lost.to(torch.uint8).argmax())
    index = [int(part) for part in torch.unravel_index(torch.tensor(position), tensor.shape)] if tensor.dim() else []
    exact = float(wide.reshape(-1)[position])
    dtype = str(tensor.dtype).removeprefix("torch.")
    text, cause = f"exact result {short(exact)} was rounded to 0", "underflow"
    if any(name in call.name for name in _NORMALISATIONS):
        text, cause = f"gave 0 for {short(exact)}: the variance passed {short(limit(dtype))}", "overflow"
    return Finding(cause, "0", text, index, exact=exact, limit=limit(dtype), shape=list(tensor.shape))
