"""The forward of one module as a torch.fx graph, its children closed boxes; refused where a graph would say less."""

from __future__ import annotations

import importlib
import inspect
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from mlpkit.nn._recognise import Refusal, is_functional_dropout


class _Typeless(fx.Proxy):
    """A value under trace that refuses ``isinstance``: the answer, no tensor, would differ from that of a run."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        module = sys._getframe(1).f_globals.get("__name__", "")
        # torch.fx and this file ask all the time, and mean the proxy; in torch itself only is_tensor asks.
        if module == __name__ or module.startswith("torch."):
            return _Typeless
        raise TypeError("its forward asks for the type of a value")


class _Tracer(fx.Tracer):
    """Children stay calls; buffers are followed, so that a forward which writes one is refused."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Typeless(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise TypeError("its forward makes tensors of its own, which a trace would freeze")
        return super().create_arg(a)


def trace(module: nn.Module) -> fx.Graph | Refusal:
    """The graph of ``module.forward``, or why there is none.

    Traced twice, in training and in evaluation: where the two differ in the flag of an ``F.dropout`` alone, the flag
    becomes ``self.training``; other differences are refused. Mode, attributes and random state stay as they were.
    """
    reason = _untraceable(module)
    if reason is not None:
        return reason
    try:
        with _left_alone(module) as changes:
            graphs = [_trace_in(module, training) for training in (True, False)]
    except Exception as error:  # noqa: BLE001 - the user's forward meets proxies here and may raise anything
        return Refusal(
            f"torch.fx cannot trace it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    if changes:
        return Refusal(f"its forward {changes[0]}, which a trace would do once")
    return _merge(*graphs)


def _untraceable(module: nn.Module) -> Refusal | None:
    if "forward" in module.__dict__:
        return Refusal("its forward was replaced on the instance")
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return Refusal("its forward has no signature")
    if any(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters):
        return Refusal("its forward has optional arguments, and a trace follows one way only")
    return None


def _trace_in(module: nn.Module, training: bool) -> fx.Graph:
    for one in module.modules():
        one.training = training
    return _Tracer().trace(module)


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[list[str]]:
    """Puts modes, attributes and random state back; yields the list that then holds what the forward had changed."""
    changes: list[str] = []
    modes = [(one, one.training) for one in module.modules()]
    before = [(one.__dict__, name, value) for one in module.modules() for name, value in one.__dict__.items()]
    insides = [
        (value, list(value.items() if isinstance(value, dict) else value)) for *_, value in before if _holds(value)
    ]
    sizes = [(one.__dict__, set(one.__dict__)) for one in module.modules()]
    python, torch_state = random.getstate(), torch.get_rng_state()
    try:
        yield changes
    finally:
        for attributes, names in sizes:
            for name in set(attributes) - names:
                changes.append(f"sets self.{name}")
                del attributes[name]
        for attributes, name, value in before:
            if attributes.get(name) is not value and name != "training":
                changes.append(f"changes self.{name}")
                attributes[name] = value
        changes += [f"changes a {type(value).__name__} of its own" for value, old in insides if _restored(value, old)]
        for one, training in modes:
            one.training = training
        if random.getstate() != python or not torch.equal(torch.get_rng_state(), torch_state):
            changes.append("draws random numbers")
            random.setstate(python)
            torch.set_rng_state(torch_state)


def _holds(value: Any) -> bool:
    return type(value) in (list, dict, set)


def _restored(value: Any, old: list[Any]) -> bool:
    """Put a list, dict or set back to what it held; whether that was needed."""
    now = list(value.items() if isinstance(value, dict) else value)
    if len(now) == len(old) and all(
        a is b or (type(a) is tuple and [*map(id, a)] == [*map(id, b)]) for a, b in zip(now, old)
    ):
        return False
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(old)
    return True


def _merge(trained: fx.Graph, evaluated: fx.Graph) -> fx.Graph | Refusal:
    """The graph of training with ``self.training`` where the two graphs hold True and False."""
    pairs = list(zip(trained.nodes, evaluated.nodes))
    if len(trained.nodes) != len(evaluated.nodes):
        return Refusal("its forward does other things in training than in evaluation")
    for node, other in pairs:
        if _text(node) == _text(other):
            continue
        flag = _flag(node), _flag(other)
        if not is_functional_dropout(node) or flag != (True, False) or _text(node, True) != _text(other, True):
            return Refusal("its forward does other things in training than in evaluation")
        _set_flag(node, trained)
    return trained


def _text(node: fx.Node, without_flag: bool = False) -> str:
    args, kwargs = list(node.args), dict(node.kwargs)
    if without_flag:
        args[2:3] = []
        kwargs.pop("training", None)
    return repr((node.name, node.op, str(node.target), args, sorted(kwargs.items())))


def _flag(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)


def _set_flag(node: fx.Node, graph: fx.Graph) -> None:
    with graph.inserting_before(node):
        # No parameter, but written out as ``self.training`` like one.
        flag = graph.create_node("get_attr", "training")
    if len(node.args) > 2:
        node.update_arg(2, flag)
    else:
        node.update_kwarg("training", flag)


def only_calls(module: nn.Module, child: str) -> bool:
    """Whether the source of the module's class does nothing with ``self.<child>`` but call it as a whole."""
    text = ""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        try:
            text += inspect.getsource(cls)
        except (OSError, TypeError):
            return False
    name = rf"\bself\.{re.escape(child)}\b"
    calls = re.findall(name + r"\s*\(", text)
    assignments = re.findall(name + r"\s*(?::[^=\n]+)?=(?!=)", text)
    return bool(calls) and len(re.findall(name, text)) == len(calls) + len(assignments)


class Rewritten(nn.Module):
    """A module whose forward was traced and written anew around fused layers; all else is the original's.

    It holds the original's parameters, buffers, submodules, hooks, mode and plain attributes; its methods other than
    ``forward`` are gone. Copies and pickles. ``rewrite`` makes one: each has a class of its own, for its forward.
    """

    _recipe: tuple[str, str, dict[str, Any]]

    def __reduce__(self) -> tuple[Any, ...]:
        name, source, names = self._recipe
        # Modules among the globals cannot be pickled; their names can.
        modules = {key: value.__name__ for key, value in names.items() if inspect.ismodule(value)}
        others = {key: value for key, value in names.items() if key not in modules and key != "__builtins__"}
        return _blank, (name, source, others, modules), self.__dict__


def rewrite(original: nn.Module, graph: fx.Graph) -> Rewritten:
    """A module with the original's contents, the very objects, and the graph as its forward."""
    code = graph.python_code("self")
    name = type(original).__name__
    new = _blank(name if isinstance(original, Rewritten) else f"Fused{name}", code.src, code.globals, {})
    copied = ("_parameters", "_buffers", "_modules")
    new.__dict__.update({name: dict(value) if name in copied else value for name, value in vars(original).items()})
    return new


def _blank(name: str, source: str, names: dict[str, Any], modules: dict[str, str]) -> Rewritten:
    names = names | {key: importlib.import_module(path) for key, path in modules.items()}
    scope = dict(names)
    exec(compile(source, f"<forward of {name}>", "exec"), scope)
    contents = {"forward": scope["forward"], "_recipe": (name, source, names), "__module__": __name__}
    cls = type(name, (Rewritten,), contents)
    new: Rewritten = object.__new__(cls)
    return new
