"""What could be fused in a model, found without touching it: chains in Sequentials and in traced forwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import fx, nn

from mlpkit.nn import _recognise as recognise
from mlpkit.nn._recognise import Activation, Dropout, Refusal
from mlpkit.nn._trace import Rewritten, only_calls, trace
from mlpkit.nn.layers import FusedLinear

NOTHING = "no activation or dropout follows"


@dataclass
class Chain:
    """A linear and what follows it. places: names of absorbed modules in a Sequential; nodes: calls in a graph."""

    path: str
    linear: nn.Linear
    scope: str
    training: bool
    activation: Activation | None = None
    dropout: Dropout | None = None
    places: list[tuple[str, nn.Module]] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    def takes(self, step: recognise.Step) -> bool:
        """Add the step if the fused layer has room for it: one activation, then one dropout."""
        if isinstance(step, Activation) and self.activation is None and self.dropout is None:
            self.activation = step
            return True
        if isinstance(step, Dropout) and self.dropout is None:
            self.dropout = step
            self.training = self.training if step.module is None else step.module.training
            return True
        return False


class Plan:
    """chains to fuse; graphs of the forwards they lie in; layers already fused; reasons for all other linears."""

    def __init__(self, model: nn.Module) -> None:
        self.chains: list[Chain] = []
        self.graphs: dict[str, fx.Graph] = {}
        self.fused: dict[str, FusedLinear] = {}
        self.left: dict[str, str] = {}
        self._places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self._calls: Counter[int] = Counter()
        self._visit("", model, None)
        for chain in [one for one in self.chains if self._calls[id(one.linear)] > 1]:
            self.chains.remove(chain)
            self.left[chain.path] = f"it is called at {self._calls[id(chain.linear)]} places"

    def _visit(self, path: str, module: nn.Module, closed: str | None) -> None:
        """closed: why a Sequential here may not be fused as a whole, or None."""
        if isinstance(module, FusedLinear):
            self.fused[path] = module
        elif isinstance(module, nn.Linear):
            self._leave(path, recognise.keeps_linear(module) or NOTHING)
        elif is_sequential(module):
            self._visit_sequential(path, module, closed)
        elif isinstance(module, (nn.ModuleList, nn.ModuleDict)) or _is_ours(module):
            self._visit_children(path, module, lambda *_: closed)
        elif type(module).__module__.startswith("torch."):
            self._leave_all(path, module, f"inside {type(module).__name__}, whose forward is PyTorch's own")
        elif any(isinstance(one, (nn.Linear, FusedLinear)) for one in module.modules()):
            self._visit_custom(path, module)

    def _visit_children(self, path: str, module: nn.Module, closed: Callable[[str, nn.Module], str | None]) -> None:
        for name, child in module._modules.items():
            if child is not None:
                self._visit(join(path, name), child, closed(join(path, name), child))

    def _visit_sequential(self, path: str, module: nn.Module, closed: str | None) -> None:
        if closed is not None:
            for name, child in module._modules.items():
                if isinstance(child, nn.Linear):
                    self._leave(join(path, name), closed)
            self._visit_children(path, module, lambda *_: closed)
            return
        parts = list(self._flat(path, module))
        for index, (name, part) in enumerate(parts):
            if isinstance(part, nn.Linear):
                self._calls[id(part)] += 1
                self._match_parts(Chain(name, part, path, part.training), parts[index + 1 :])
            else:
                self._visit(name, part, None)

    def _flat(self, path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The parts in order of execution; a Sequential inside is opened unless something else may see its result."""
        for name, child in module._modules.items():
            if child is None:
                continue
            inner = join(path, name)
            if is_sequential(child) and self._places[id(child)] == 1 and recognise.changed(child) is None:
                yield from self._flat(inner, child)
            else:
                yield inner, child

    def _match_parts(self, chain: Chain, following: list[tuple[str, nn.Module]]) -> None:
        reason: str | None = self._keeps(chain.linear)
        for name, part in following:
            if type(part) is nn.Identity and recognise.changed(part) is None:
                continue
            step = recognise.of_module(part)
            if isinstance(part, nn.PReLU) and self._places[id(part)] > 1:
                step = Refusal("its PReLU is shared")
            if reason is not None or not chain.takes(step):
                reason = reason or (step if isinstance(step, Refusal) else None)
                break
            chain.places.append((name, part))
        self._settle(chain, reason)

    def _visit_custom(self, path: str, module: nn.Module) -> None:
        name = type(module).__name__
        hidden = _hidden(module)
        if hidden is not None:
            self._leave_all(path, module, f"{name} keeps modules outside of the module tree, in self.{hidden}")
            return
        graph = trace(module)
        if isinstance(graph, Refusal):
            self._visit_untraced(path, module, f"{name}: {graph}")
            return
        self.graphs[path] = graph
        modules = dict(module.named_modules(remove_duplicate=False))
        for node in graph.nodes:
            if node.op == "call_module":
                self._match_node(path, node, modules)
        targets = {join(path, str(node.target)) for node in graph.nodes if node.op == "call_module"}

        def closed(child: str, _: nn.Module) -> str | None:
            if any(target.startswith(child + ".") for target in targets):
                return f"the forward of {name} calls parts of its container one by one"
            return None if child in targets else f"the forward of {name} does not call it"

        self._visit_scope(path, module, closed)

    def _visit_untraced(self, path: str, module: nn.Module, reason: str) -> None:
        for name, child in module._modules.items():
            if isinstance(child, nn.Linear):
                self._leave(join(path, name), reason)

        def closed(child: str, _: nn.Module) -> str | None:
            name = child.rpartition(".")[2]
            known = name in module._modules and join(path, name) == child and only_calls(module, name)
            return None if known else reason

        self._visit_scope(path, module, closed)

    def _visit_scope(self, path: str, module: nn.Module, closed: Callable[[str, nn.Module], str | None]) -> None:
        """Visit children; those of lists and dicts, which have no forward, belong to the same scope."""
        for name, child in module._modules.items():
            inner = join(path, name)
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                self._visit_scope(inner, child, closed)
            elif isinstance(child, nn.Linear):
                self._leave(inner, closed(inner, child) or NOTHING)
            elif child is not None:
                self._visit(inner, child, closed(inner, child))

    def _match_node(self, scope: str, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        linear = modules[str(node.target)]
        if not isinstance(linear, nn.Linear):
            return
        self._calls[id(linear)] += 1
        chain = Chain(join(scope, str(node.target)), linear, scope, modules[""].training, nodes=[node])
        reason: str | None = self._keeps(linear)
        if len(node.args) != 1 or node.kwargs:
            reason = reason or "it is called with other arguments than one tensor"
        while reason is None and len(chain.nodes[-1].users) == 1:
            following = next(iter(chain.nodes[-1].users))
            step = recognise.dropout_call(following) or recognise.of_node(following, modules)
            if following.args[:1] != (chain.nodes[-1],) or not chain.takes(step):
                reason = step if isinstance(step, Refusal) else None
                break
            chain.nodes.append(following)
        if len(chain.nodes) == 1 and len(node.users) > 1:
            reason = reason or "its result is used at several places"
        self._settle(chain, reason)

    def _keeps(self, linear: nn.Linear) -> str | None:
        if self._places[id(linear)] > 1:
            return f"it is shared: registered at {self._places[id(linear)]} places"
        return recognise.keeps_linear(linear)

    def _settle(self, chain: Chain, reason: str | None) -> None:
        if chain.activation is None and chain.dropout is None:
            self._leave(chain.path, reason or NOTHING)
        else:
            self.chains.append(chain)

    def _leave(self, path: str, reason: str) -> None:
        if all(chain.path != path for chain in self.chains):
            self.left.setdefault(path, reason)

    def _leave_all(self, path: str, module: nn.Module, reason: str) -> None:
        for name, part in module.named_modules(remove_duplicate=False):
            if isinstance(part, nn.Linear):
                self._leave(join(path, name) if name else path, reason)
            elif isinstance(part, FusedLinear):
                self.fused[join(path, name) if name else path] = part


def join(path: str, name: str) -> str:
    """The qualified name of a child."""
    return f"{path}.{name}" if path else name


def is_sequential(module: nn.Module) -> bool:
    """Whether the module runs its children in order and does nothing else."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("mlpkit.") and not isinstance(module, Rewritten)


def _hidden(module: nn.Module) -> str | None:
    """The attribute in which the module holds modules that would not be replaced with the registered ones."""

    def holds(value: Any) -> bool:
        if isinstance(value, MethodType):
            return isinstance(value.__self__, nn.Module)
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        return isinstance(value, nn.Module) or any(holds(one) for one in values)

    own = ("_parameters", "_buffers", "_modules")
    return next((name for name, value in vars(module).items() if name not in own and holds(value)), None)
