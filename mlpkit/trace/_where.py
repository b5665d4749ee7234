"""Where an operation runs: step, phase, module, user line, autograd node.

Module names come from torch's global module hooks, steps from its global optimizer hooks; a backward operation is
mapped to the forward operation with its autograd sequence number. All hooks are removed by ``close``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mlpkit.trace._intercept import OpCall
from mlpkit.trace._records import OpRecord, Place

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_GUARD = os.path.join(_OURS, "guard") + os.sep
_SCALING = os.path.join(_GUARD, "scale.py")
_SCALER_FILE = os.path.join(_TORCH, "amp", "grad_scaler.py")
_UPDATE_FILES = (os.path.join(_TORCH, "optim"), os.path.join(_TORCH, "nn", "utils", "clip_grad.py"))
_MOST_NODES = 1 << 17  # of forward operations that backward ones can be mapped to, per step
_NO_SEQUENCE = 1 << 63


class Surroundings:
    """Follows the program; ``place(call, parents)`` says where an operation stands."""

    def __init__(self, model: torch.nn.Module | None) -> None:
        self.step = 0
        self.counting = True
        self.scaling = False  # a gradient scaler has been seen
        self.ended = False  # an optimizer step has been seen; the next step begins with the next fresh work
        self.on_root: Callable[[torch.nn.Module], None] = lambda root: None
        self.on_output: Callable[[torch.nn.Module, Any], None] = lambda root, output: None
        self.on_optimizer: Callable[[Optimizer], None] = lambda optimizer: None
        self.on_backward: Callable[[Sequence[torch.Tensor]], None] = lambda roots: None
        self.on_backward_done: Callable[[], None] = lambda: None
        self.on_step: Callable[[], None] = lambda: None
        self.name_of: Callable[[torch.Tensor], str] = lambda tensor: ""
        self._names: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
        self._stack: list[str] = []
        self._depth_at_backward: list[int] = []
        self._in_optimizer = False
        self._sequence: dict[int, Place] = {}
        self._older_sequence: dict[int, Place] = {}
        self._files: dict[str, tuple[str, str]] = {}
        self._removers: list[Callable[[], None]] = []
        if model is not None:
            self.adopt(model)

    def open(self) -> None:
        """Attach all hooks."""
        # torch.compile warns of global hooks; a traced program shall say no more than it says untraced.
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        self._removers.append(partial(_drop_filter, warnings.filters[0]))
        for hook in (
            torch_module.register_module_forward_pre_hook(self._enter_module),
            torch_module.register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ):
            self._removers.append(hook.remove)
        autograd: Any = torch.autograd  # its engine entry is private; every backward() and grad() goes through it
        engine = autograd._engine_run_backward

        def watched(roots: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            outermost = torch._C._current_graph_task_id() == -1
            if outermost:
                self._in_optimizer = False
                self.on_backward(roots)
            self._depth_at_backward.append(len(self._stack))
            try:
                result = engine(roots, *args, **kwargs)
            finally:
                self._depth_at_backward.pop()
            if outermost:
                self.on_backward_done()
            return result

        autograd._engine_run_backward = watched
        self._removers.append(lambda: setattr(autograd, "_engine_run_backward", engine))

    def close(self) -> None:
        """Detach everything ``open`` attached."""
        while self._removers:
            self._removers.pop()()

    def adopt(self, root: torch.nn.Module) -> None:
        """Name the modules below a root as ``root.named_modules()`` does."""
        for name, module in root.named_modules():
            self._names[module] = _without_wrapper(name)

    def next_step(self) -> None:
        """Begin the next step now."""
        self.step += 1
        self.ended = False
        self._older_sequence, self._sequence = self._sequence, {}
        self.on_step()

    @property
    def in_optimizer(self) -> bool:
        """Inside an optimizer's ``step()``."""
        return self._in_optimizer

    def place(self, call: OpCall, parents: tuple[OpRecord, ...]) -> Place:
        """Where ``call`` runs, given the records that made its inputs."""
        file, line, updating = self._user_frame(call.builds_graph)
        node: Any = torch._C._current_autograd_node()
        inside = len(self._stack) > (self._depth_at_backward[-1] if self._depth_at_backward else 0)
        # A module that runs during backward is a checkpointed forward, run again.
        if node is not None and not inside:
            return self._backward_place(node, file, line)
        if inside:
            phase = "forward"
        elif updating or self._in_optimizer or self._is_update(call, parents):
            phase = "optimizer"
        else:
            phase = "source" if _is_conversion(call, parents) else "forward"
        if self.ended and self.counting and self._is_fresh(call, phase, parents):
            self.next_step()
        place = Place(self.step, phase, self._stack[-1] if self._stack else "", file, line, "")
        self._note(place)
        return place

    def note_view(self) -> None:
        """A view has an autograd node of its own, whose backward may be a real operation."""
        if torch._C._current_autograd_node() is None:
            file, line, _ = self._user_frame(True)
            module = self._stack[-1] if self._stack else ""
            self._note(Place(self.step, "forward", module, file, line, ""))

    def _note(self, place: Place) -> None:
        self._sequence.setdefault(_sequence_number() - 1, place)
        if len(self._sequence) > _MOST_NODES:
            self._older_sequence, self._sequence = self._sequence, {}

    def _backward_place(self, node: Any, file: str, line: int) -> Place:
        name = node.name().removeprefix("torch::autograd::")
        number = node._sequence_nr()
        if number >= _NO_SEQUENCE:
            owner = self.name_of(node.variable) if hasattr(node, "variable") else ""
            return Place(self.step, "backward", owner.rpartition(".")[0], file, line, name)
        origin = self._sequence.get(number) or self._older_sequence.get(number)
        if origin is None:
            return Place(self.step, "backward", "", file, line, name)
        return Place(self.step, "backward", origin.module, origin.file, origin.line, name)

    def _is_update(self, call: OpCall, parents: tuple[OpRecord, ...]) -> bool:
        """A hand-written update, clip or unscale: no graph is built and gradients flow in."""
        if call.builds_graph or not parents:
            return False
        return any(
            record.place.step == self.step
            and (record.place.phase == "backward" or (record.place.phase == "optimizer" and not record.subject))
            for record in parents
        )

    def _is_fresh(self, call: OpCall, phase: str, parents: tuple[OpRecord, ...]) -> bool:
        """Work of the next step: neither an update nor something that merely looks at this step's results."""
        if phase == "optimizer":
            return False
        if self._stack:
            return True
        results = [record.place.step == self.step and not _comes_from_outside(record) for record in parents]
        return not all(results) if call.builds_graph else not any(results)

    def _user_frame(self, builds_graph: bool) -> tuple[str, int, bool]:
        updating = False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            known = self._files.get(name)
            if known is None:
                known = self._files[name] = (_kind_of_file(name), _short(name))
            kind, shown = known
            if kind == "user":
                return shown, frame.f_lineno, updating
            self.scaling = self.scaling or kind == "scaler"
            updating = updating or kind in ("update", "scaler") or (kind == "guard" and not builds_graph)
            frame = frame.f_back
        return "", 0, updating

    def _enter_module(self, module: torch.nn.Module, args: Any) -> None:
        if not _watched():
            return
        if not self._stack:
            if module not in self._names:
                self.adopt(module)
            self.on_root(module)
        self._stack.append(self._names.get(module, self._stack[-1] if self._stack else ""))

    def _leave_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not _watched():
            return
        if self._stack:
            self._stack.pop()
        if not self._stack:
            self.on_output(module, output)

    def _enter_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_optimizer = True
        self.on_optimizer(optimizer)

    def _leave_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_optimizer = False
        self.on_optimizer(optimizer)
        self.ended = True


def _watched() -> bool:
    """Hooks are global, interception belongs to a thread: modules of other threads are not followed."""
    return torch._C._len_torch_dispatch_stack() > 0


def _drop_filter(entry: Any) -> None:
    filters: Any = warnings.filters
    if entry in filters:
        filters.remove(entry)


def _without_wrapper(name: str) -> str:
    """A qualified name without the level that ``torch.compile`` puts in between."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _comes_from_outside(record: OpRecord) -> bool:
    return record.place.phase == "source" or bool(record.subject)


def _is_conversion(call: OpCall, parents: tuple[OpRecord, ...]) -> bool:
    """A cast of data or of a parameter, outside any forward."""
    if call.name not in ("_to_copy", "copy_") or call.builds_graph:
        return False
    if not parents:  # integers
        return call.name == "_to_copy"
    return all(not record.derived or record.subject for record in parents)


_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


def _kind_of_file(name: str) -> str:
    if name == _SCALER_FILE:
        return "scaler"
    if name == _SCALING or name.startswith(_UPDATE_FILES):
        return "update"
    if name.startswith(_TORCH) or name.startswith("<frozen"):
        return "torch"
    if name.startswith(_GUARD):
        return "guard"
    return "ours" if name.startswith(_OURS) else "user"


def _short(name: str) -> str:
    here = os.getcwd() + os.sep
    path = os.path.abspath(name) if os.path.exists(name) else name
    return path.removeprefix(here)
