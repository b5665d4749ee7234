"""Where an operation runs: what Python must tell the native observer about modules, steps and backward passes.

Module names come from torch's global module hooks, steps from its global optimizer hooks. All hooks are removed by
``close``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mlpkit import _C

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_GUARD = os.path.join(_OURS, "guard") + os.sep
_SCALING = os.path.join(_GUARD, "scale.py")
_SCALER_FILE = os.path.join(_TORCH, "amp", "grad_scaler.py")
_UPDATE_FILES = (os.path.join(_TORCH, "optim"), os.path.join(_TORCH, "nn", "utils", "clip_grad.py"))
_USER, _PASSED, _UPDATE, _SCALER, _GUARDING = range(5)  # as csrc/bindings_observe.h numbers kinds of files


class Names:
    """Qualified names of modules, by number; 0 is no module."""

    def __init__(self, native: _C.Observer) -> None:
        self._native = native
        self._names = [""]
        self._numbers = {"": 0}
        self._alive: dict[int, tuple[ref[torch.nn.Module], str]] = {}

    def name(self, number: int) -> str:
        """The name behind a number."""
        return self._names[number]

    def number(self, name: str) -> int:
        """The number of a name."""
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def adopt(self, root: torch.nn.Module) -> None:
        """Name the modules below a root as ``root.named_modules()`` does."""
        for name, module in root.named_modules():
            name = _without_wrapper(name)
            self._alive[id(module)] = ref(module, partial(self._gone, id(module))), name
            self._native.adopt(module, self.number(name))

    def prefix(self, module: torch.nn.Module) -> str | None:
        """What stands before the names of a module's own parameters; None for a module that has no name yet."""
        known = self._alive.get(id(module))
        return None if known is None else f"{known[1]}." if known[1] else ""

    def _gone(self, key: int, weak: object) -> None:
        known = self._alive.get(key)
        if known is not None and known[0] is weak:
            del self._alive[key]
            self._native.forget(key)


class Quiet:
    """While it is entered, nothing is observed: the tracer itself looks at tensors."""

    def __init__(self, native: _C.Observer) -> None:
        self._native = native

    def __enter__(self) -> None:
        self._native.paused += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._native.paused -= 1


class Surroundings:
    """Hooks that follow the program."""

    def __init__(self, native: _C.Observer) -> None:
        self.native = native
        self.on_optimizer: Callable[[Optimizer], None] = lambda optimizer: None
        self._removers: list[Callable[[], None]] = []

    @property
    def step(self) -> int:
        """The step that runs."""
        return int(self.native.step)

    def open(self) -> None:
        """Attach all hooks."""
        # torch.compile warns of global hooks; a traced program shall say no more than it says untraced.
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        self._removers.append(partial(_drop_filter, warnings.filters[0]))
        for hook in (
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ):
            self._removers.append(hook.remove)
        self._removers.append(follow_modules(self.native))
        autograd: Any = torch.autograd  # its engine entry is private; every backward() and grad() goes through it
        engine = autograd._engine_run_backward

        autograd._engine_run_backward = self.native.follow_backward(engine)
        self._removers.append(lambda: setattr(autograd, "_engine_run_backward", engine))
        self._removers.append(run_compiled_code_eagerly())
        self._removers.append(print_unseen(self.native))

    def close(self) -> None:
        """Detach everything ``open`` attached."""
        while self._removers:
            self._removers.pop()()

    def _enter_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.native.begin_update(optimizer):
            with Quiet(self.native):
                self.on_optimizer(optimizer)

    def _leave_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.native.end_update(optimizer):
            with Quiet(self.native):
                self.on_optimizer(optimizer)


def follow_modules(native: _C.Observer | _C.Outputs) -> Callable[[], None]:
    """Every module call goes by the observer: global hooks would take torch's slow path. Returns what undoes it."""
    module: Any = torch.nn.Module
    call = module.__dict__["__call__"]
    followed = native.follow(call)
    module.__call__ = followed

    def undo() -> None:
        if module.__dict__["__call__"] is followed:
            module.__call__ = call

    return undo


def print_unseen(native: _C.Observer) -> Callable[[], None]:
    """What torch computes to print a tensor is not the program's; returns what undoes that."""
    printing: Any = torch._tensor_str
    text = printing._str

    def unseen(*args: Any, **kwargs: Any) -> str:
        if not native.here():
            return str(text(*args, **kwargs))
        with Quiet(native):
            return str(text(*args, **kwargs))

    printing._str = unseen

    def undo() -> None:
        if printing._str is unseen:
            printing._str = text

    return undo


def run_compiled_code_eagerly() -> Callable[[], None]:
    """Compiled code would hide its operations, so that ``torch.compile`` is passed over; returns what undoes that."""
    undo: list[Callable[[], None]] = []

    def force() -> None:
        stance = torch.compiler.set_stance("force_eager")
        undo.append(partial(stance.__exit__, None, None, None))

    if "torch._dynamo" in sys.modules:
        force()
        return undo[0]
    # Importing the compiler takes seconds: it is told when the program itself brings it.
    compiler = torch.compile

    def brought(*args: Any, **kwargs: Any) -> Any:
        result = compiler(*args, **kwargs)
        if not undo and torch.compile is brought and "torch._dynamo" in sys.modules:
            force()
        return result

    torch.compile = brought

    def put_back() -> None:
        if torch.compile is brought:
            torch.compile = compiler
        for one in undo:
            one()

    return put_back


def _cell(name: str) -> int | None:
    """The number of the cell that IPython compiled under this name."""
    shell: Any = sys.modules.get("IPython")
    shell = shell.get_ipython() if shell is not None else None
    known: dict[str, int] = getattr(getattr(shell, "compile", None), "_filename_map", {})
    return known.get(name)


def _drop_filter(entry: Any) -> None:
    filters: Any = warnings.filters
    if entry in filters:
        filters.remove(entry)


def _without_wrapper(name: str) -> str:
    """A qualified name without the level that ``torch.compile`` puts in between."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def kind_of_file(name: str) -> int:
    """What a file is, for the native observer's search of the user's line."""
    if name == _SCALER_FILE:
        return _SCALER
    if name == _SCALING or name.startswith(_UPDATE_FILES):
        return _UPDATE
    if name.startswith(_TORCH) or name.startswith("<frozen"):
        return _PASSED
    if name.startswith(_GUARD):
        return _GUARDING
    return _PASSED if name.startswith(_OURS) else _USER


def in_guard() -> bool:
    """Whether the guard's own code is what runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OURS + "trace", _TORCH)):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(_GUARD)


def short(name: str) -> str:
    """A file's name, relative to the working directory where it lies inside; ``In[7]`` for a notebook's cell."""
    cell = _cell(name)
    if cell is not None:
        return f"In[{cell}]"
    here = os.getcwd() + os.sep
    path = os.path.abspath(name) if os.path.exists(name) else name
    return path.removeprefix(here)
