"""IEEE 754 rules by operation: which operands of one element make NaN or Inf, and what that is called.

A rule gets the operands of the bad element by schema name and answers (cause, text), or None if it has nothing to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mlpkit.trace._numbers import short

Operands = Mapping[str, float]
Answer = tuple[str, str] | None
Rule = Callable[[Operands], Answer]


def multiply(a: float, b: float) -> Answer:
    """0 * Inf."""
    if (a == 0 and math.isinf(b)) or (b == 0 and math.isinf(a)):
        return "zero_times_inf", f"{short(a)} * {short(b)}"
    return None


def add(a: float, b: float) -> Answer:
    """Inf - Inf, written as the sum of opposite infinities."""
    if math.isinf(a) and math.isinf(b) and a != b:
        return "inf_minus_inf", f"{short(a)} + {short(b)}".replace("+ -", "- ")
    return None


def divide(a: float, b: float) -> Answer:
    """x / 0, 0 / 0, Inf / Inf."""
    if b == 0:
        return ("zero_over_zero" if a == 0 else "division_by_zero"), f"{short(a)} / 0"
    if math.isinf(a) and math.isinf(b):
        return "inf_over_inf", f"{short(a)} / {short(b)}"
    return None


def logarithm(name: str, value: float, pole: float = 0.0) -> Answer:
    """log at its pole and below."""
    if value == pole:
        return "log_of_zero", f"{name} of {short(value)}"
    if value < pole:
        return "domain", f"{name} of {short(value)} is not a number"
    return None


def root(value: float) -> Answer:
    """sqrt of a negative number."""
    return ("sqrt_of_negative", f"sqrt of {short(value)}") if value < 0 else None


def power(base: float, exponent: float) -> Answer:
    """0 ** negative, negative ** fraction."""
    if base == 0 and exponent < 0:
        return "division_by_zero", f"0 to the power {short(exponent)}"
    if base < 0 and math.isfinite(exponent) and exponent != int(exponent):
        cause = "sqrt_of_negative" if abs(exponent) == 0.5 else "domain"
        return cause, f"{short(base)} to the power {short(exponent)} is not a number"
    return None


def _other(o: Operands) -> float:
    for name in ("other", "scalar", "scalars", "exponent", "value"):
        if name in o:
            return o[name]
    return math.nan


def _addition(o: Operands) -> Answer:
    other, alpha = _other(o), o.get("alpha", 1.0)
    return multiply(alpha, other) or add(o["self"], alpha * other)


def _subtraction(o: Operands) -> Answer:
    other, alpha = _other(o), o.get("alpha", 1.0)
    return multiply(alpha, other) or add(o["self"], -alpha * other)


def _reverse_subtraction(o: Operands) -> Answer:
    return add(_other(o), -o["self"] * o.get("alpha", 1.0))


def _addcmul(o: Operands) -> Answer:
    first, second = o["tensor1"], o["tensor2"]
    value = o.get("value", o.get("scalars", 1.0))
    product = first * second
    return multiply(first, second) or multiply(value, product) or add(o["self"], value * product)


def _addcdiv(o: Operands) -> Answer:
    first, second = o["tensor1"], o["tensor2"]
    value = o.get("value", o.get("scalars", 1.0))
    bad = divide(first, second)
    if bad or second == 0:
        return bad
    return multiply(value, first / second) or add(o["self"], value * (first / second))


def _lerp(o: Operands) -> Answer:
    end = o.get("end", o.get("tensors1", math.nan))
    return add(end, -o["self"]) or multiply(o.get("weight", 1.0), end - o["self"])


def _reciprocal_root(o: Operands) -> Answer:
    return ("division_by_zero", "1 / sqrt(0)") if o["self"] == 0 else root(o["self"])


def _arc(name: str, low: float, high: float) -> Rule:
    def rule(o: Operands) -> Answer:
        value = o["self"]
        inside = low <= value <= high
        return None if inside else ("domain", f"{name} of {short(value)} is outside its domain")

    return rule


def _atanh(o: Operands) -> Answer:
    if abs(o["self"]) == 1:
        return "division_by_zero", f"atanh of {short(o['self'])}"
    return _arc("atanh", -1.0, 1.0)(o)


def _logit(o: Operands) -> Answer:
    value = o["self"]
    if value == 0:
        return "log_of_zero", "logit of 0"
    return ("division_by_zero", "logit of 1") if value == 1 else _arc("logit", 0.0, 1.0)(o)


def _xlogy(o: Operands) -> Answer:
    return multiply(o["self"], math.inf) or logarithm("log", _other(o))


def _periodic(o: Operands) -> Answer:
    return ("domain", f"an angle of {short(o['self'])}") if math.isinf(o["self"]) else None


def _gate(o: Operands) -> Answer:
    """x * s(x) with s(-Inf) = 0."""
    return multiply(o["self"], 0.0) if o["self"] == -math.inf else None


def _pole(o: Operands) -> Answer:
    value = o["self"]
    return ("domain", f"a pole at {short(value)}") if value <= 0 and value == math.floor(value) else None


RULES: dict[str, Rule] = {
    "add": _addition,
    "sub": _subtraction,
    "rsub": _reverse_subtraction,
    "mul": lambda o: multiply(o["self"], _other(o)),
    "div": lambda o: divide(o["self"], _other(o)),
    "floor_divide": lambda o: divide(o["self"], _other(o)),
    "fmod": lambda o: ("division_by_zero", f"{short(o['self'])} modulo 0") if _other(o) == 0 else None,
    "remainder": lambda o: ("division_by_zero", f"{short(o['self'])} modulo 0") if _other(o) == 0 else None,
    "reciprocal": lambda o: divide(1.0, o["self"]),
    "sqrt": lambda o: root(o["self"]),
    "rsqrt": _reciprocal_root,
    "log": lambda o: logarithm("log", o["self"]),
    "log2": lambda o: logarithm("log2", o["self"]),
    "log10": lambda o: logarithm("log10", o["self"]),
    "log1p": lambda o: logarithm("log1p", o["self"], -1.0),
    "special_entr": lambda o: logarithm("entropy", o["self"]),
    "pow": lambda o: power(o["self"], _other(o)),
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "acos": _arc("acos", -1.0, 1.0),
    "asin": _arc("asin", -1.0, 1.0),
    "acosh": _arc("acosh", 1.0, math.inf),
    "atanh": _atanh,
    "erfinv": lambda o: ("domain", f"erfinv of {short(o['self'])}") if abs(o["self"]) >= 1 else None,
    "logit": _logit,
    "xlogy": _xlogy,
    "sin": _periodic,
    "cos": _periodic,
    "tan": _periodic,
    "silu": _gate,
    "gelu": _gate,
    "lgamma": _pole,
    "digamma": _pole,
}


def judge(base: str, operands: Operands) -> Answer:
    """The rule of an operation for one element; operations without a rule of their own are judged by their operands."""
    rule = RULES.get(base)
    try:
        answer = rule(operands) if rule else None
    except KeyError:
        answer = None  # an overload with other argument names
    if answer or rule:
        return answer
    values = list(operands.values())
    infinite = [value for value in values if math.isinf(value)]
    if infinite and 0.0 in values:
        return "zero_times_inf", f"0 * {short(infinite[0])}"
    if infinite:
        return "inf_minus_inf", f"{short(infinite[0])} among its operands"
    return None
