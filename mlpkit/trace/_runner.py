"""Runs a script or module as python would run it, under a tracer."""

from __future__ import annotations

import _thread
import builtins
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import open_code
from pathlib import Path
from types import ModuleType, TracebackType

import torch

from mlpkit.errors import DataError
from mlpkit.trace._tracer import Tracer

FAILED = 3  # the exit code that tells of a failure
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_RUNPY = ("<frozen runpy>", runpy.__file__)
_WRAPPERS = (os.path.join("torch", "_compile.py"), os.path.join("torch", "_dynamo", "eval_frame.py"))
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass
class Outcome:
    """How the traced program ended."""

    code: int
    tracer: Tracer


def run(target: str, arguments: Sequence[str], *, module: bool, level: str, stop_at_first: bool = False) -> Outcome:
    """Run ``target`` (a path, or a module's name) as ``__main__``; the exit code is the program's own.

    stop_at_first: interrupt it, as Ctrl-C does, at the end of the first step with a failure; the code is 3 then.

    Raises DataError when there is no such script or module.
    """
    program = _module(target) if module else _script(target)
    tracer = Tracer(level=level)
    if stop_at_first:
        tracer.stop_at_first(_thread.interrupt_main)
    with _as_main(target, arguments, module=module):
        code = _guarded(program, tracer)
    sys.stdout.flush()
    return Outcome(FAILED if tracer.stopped else code, tracer)


def _script(target: str) -> Callable[[], object]:
    path = Path(target)
    if not path.exists():
        raise DataError(f"trace: there is no script {target!r}")
    if path.is_dir() and not (path / "__main__.py").exists():
        raise DataError(f"trace: {target!r} is a folder without __main__.py")
    if path.is_dir():
        return lambda: runpy.run_path(target, run_name="__main__")
    return lambda: _run_file(os.path.abspath(target))


def _run_file(path: str) -> None:
    """What ``runpy.run_path`` does, with ``sys.argv[0]`` left as the user typed it."""
    main = ModuleType("__main__")
    main.__file__ = path
    main.__dict__["__builtins__"] = builtins
    with open_code(path) as stream:
        code = compile(stream.read(), path, "exec", dont_inherit=True)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    finally:
        sys.modules["__main__"] = before


def _module(target: str) -> Callable[[], object]:
    sys.path.insert(0, os.getcwd())
    try:
        spec = find_spec(target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{target}.__main__")
        found = spec is not None
    except ModuleNotFoundError:
        found = False
    finally:
        sys.path.pop(0)
    if not found:
        raise DataError(f"trace: there is no module {target!r} that can be run")
    return lambda: runpy.run_module(target, run_name="__main__", alter_sys=True)


@contextmanager
def _as_main(target: str, arguments: Sequence[str], *, module: bool) -> Iterator[None]:
    """``sys.argv`` and ``sys.path[0]`` as python sets them; put back afterwards."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [target, *arguments]
    # ``mlpkit`` itself is a console script: its own folder stands first and is none of the program's business.
    sys.path[0] = os.getcwd() if module else str(Path(target).resolve().parent)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _guarded(program: Callable[[], object], tracer: Tracer) -> int:
    try:
        with tracer:
            program()
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt as error:
        if not tracer.stopped:
            _print(error)
        return 130
    except BaseException as error:  # noqa: BLE001 - whatever the program raises is shown as python shows it
        _print(error)
        return 1
    return 0


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    print(stop.code, file=sys.stderr)
    return 1


def _print(error: BaseException) -> None:
    """The traceback as python prints it: without the frames of the tracer and of runpy."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = _own_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    traceback.print_exception(error)


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    kept: list[TracebackType] = []
    ours = False
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(_HERE):
            # torch wraps the interceptor, and between it and the operation lie torch's frames again.
            while kept and kept[-1].tb_frame.f_code.co_filename.endswith(_WRAPPERS):
                kept.pop()
            ours = True
        ours = ours and name.startswith((_HERE, _TORCH))
        if not ours and name not in _RUNPY:
            kept.append(trace)
        trace = trace.tb_next
    chain: TracebackType | None = None
    for entry in reversed(kept):
        chain = TracebackType(chain, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return chain
