"""How many answers are right: the tracer beside anomaly mode, an is-finite mode and Hugging Face's hooks."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from corpus.case import Case, Variant, execute
from corpus.oracle import Birth, Oracle

QUESTIONS = ("verdict", "where", "cause", "module", "line")


class Truth(NamedTuple):
    """Operation, phase and step, with what only a run can tell filled in."""

    op: str
    phase: str
    step: int


def truth_of(case: Case, variant: Variant) -> Truth:
    """The truth of one variant."""
    if case.op and case.step is not None:
        return Truth(case.op, case.phase, case.step)
    with Oracle() as oracle:
        execute(case, variant)
    first = next(birth for birth in oracle.births if birth.phase == case.phase)
    return Truth(case.op or first.op, case.phase, first.step if case.step is None else case.step)


def judge(case: Case, variant: Variant, found: dict[str, Any], truth: Truth) -> dict[str, bool]:
    """Which parts of a diagnosis are right."""
    location = found["location"] or ""
    return {
        "verdict": found["verdict"] == "failure",
        "where": (found["op"], found["phase"], found["step"]) == truth,
        "cause": found["cause"] == case.cause,
        "module": case.module(variant) in ("*", found["module"]),
        "line": case.line is None or location.endswith(f":{case.line}"),
    }


def by_tracer(run: Callable[[], Any]) -> dict[str, Any]:
    """The diagnosis of a run."""
    from mlpkit.trace import Tracer

    with Tracer() as tracer:
        run()
    return tracer.diagnosis.to_dict()


def by_anomaly_mode(run: Callable[[], Any]) -> Birth | None:
    """What ``detect_anomaly`` says: the backward node that returned NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autograd.detect_anomaly():
                run()
        except RuntimeError as error:
            node = re.search(r"Function '(\w+?)(Backward\d*)?' returned nan", str(error))
            return Birth(node.group(1).lower() if node else "", "backward", -1)
    return None


def by_module_hooks(run: Callable[[], Any]) -> str | None:
    """The module that Hugging Face's ``DebugUnderflowOverflow``, attached to every model, stops at; None for none."""
    from transformers.debug_utils import DebugUnderflowOverflow

    attached: set[int] = set()
    kept: list[Any] = []
    stopped: list[str] = []

    class Debug(DebugUnderflowOverflow):
        def dump_saved_frames(self) -> None:
            stopped.append(next(line for line in self.frames[-1].splitlines() if line.startswith(self.prefix)).strip())

    def attach(module: torch.nn.Module, args: Any) -> None:
        if id(module) not in attached:
            attached.update(id(one) for one in module.modules())
            kept.append(Debug(module))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(attach)
    try:
        run()
    except ValueError:
        if not stopped:
            raise
    except NotImplementedError:
        return None  # it asks for the magnitude of a mask of bools: an end of the program, and no answer
    finally:
        hook.remove()
    return stopped[0].rpartition(" ")[0] if stopped else None


def by_finite_mode(run: Callable[[], Any]) -> Birth | None:
    """What asking every result for NaN and Inf says: the first operation."""
    with Oracle() as oracle:
        run()
    return oracle.births[0] if oracle.births else None


def plain(name: str) -> str:
    """An operation's name as a backward node spells it."""
    return name.strip("_").replace("_", "").removeprefix("native").removeprefix("foreach")


def answers(case: Case, variant: Variant, *, modules: bool = False) -> dict[str, list[str]]:
    """What each tool gets right of a failing program. modules: DebugUnderflowOverflow too, whose answer is a module."""
    truth = truth_of(case, variant)
    run = partial(execute, case, variant)
    verdict = judge(case, variant, by_tracer(run), truth)
    right = {
        "mlpkit": (verdict["verdict"], verdict["where"], verdict["cause"]),
        "anomaly mode": _answer(by_anomaly_mode(run), truth, step=False),
        "is-finite mode": _answer(by_finite_mode(run), truth, step=True),
    }
    if modules:
        stopped = by_module_hooks(run)
        named = truth.phase == "forward" and case.module(variant) in ("*", stopped)
        right["DebugUnderflowOverflow"] = (stopped is not None, named, False)
    return {name: _words(case, *parts) for name, parts in right.items()}


def _words(case: Case, fired: bool, where: bool, cause: bool) -> list[str]:
    """What counts, by the heads of the table."""
    said = {
        "failures": True, "fired": fired, "where": fired and where, "cause": fired and cause,
        "roots": case.root, "root": case.root and fired and cause,
        "silent": case.silent, "explained": case.silent and fired and cause, "seen": case.silent and fired,
    }  # fmt: skip
    return [word for word, so in said.items() if so]


def alarms(run: Callable[[], Any], *, modules: bool = False) -> dict[str, list[str]]:
    """Which tools say that something is wrong with a healthy program."""
    raised = {
        "mlpkit": by_tracer(run)["verdict"] != "healthy",
        "anomaly mode": by_anomaly_mode(run) is not None,
        "is-finite mode": by_finite_mode(run) is not None,
    }
    if modules:
        raised["DebugUnderflowOverflow"] = by_module_hooks(run) is not None
    return {name: ["healthy", *(["alarms"] if so else [])] for name, so in raised.items()}


def table_of(programs: Iterable[dict[str, list[str]]]) -> dict[str, dict[str, int]]:
    """One row of counts for each tool."""
    table: dict[str, Counter[str]] = {}
    for found in programs:
        for name, words in found.items():
            table.setdefault(name, Counter()).update(words)
    return {name: dict(row) for name, row in table.items()}


def _answer(birth: Birth | None, truth: Truth, *, step: bool) -> tuple[bool, bool, bool]:
    """Neither rival names a cause; anomaly mode knows no step."""
    if birth is None:
        return False, False, False
    same = plain(birth.op) == plain(truth.op)
    return True, same and (not step or birth.step == truth.step), False


def lines(table: dict[str, dict[str, int]]) -> list[str]:
    """The table as text."""
    heads = ("fired", "where", "cause", "root", "explained", "alarms")
    found = [f"{'':24}" + "".join(f"{head:>12}" for head in heads)]
    for name, row in table.items():
        of = {"fired": "failures", "where": "failures", "cause": "failures", "root": "roots"}
        of |= {"explained": "silent", "alarms": "healthy"}
        cells = "".join(f"{row.get(h, 0):>7}/{row.get(of[h], 0):<4}" for h in heads)
        found.append(f"{name:24}{cells}")
    return found
