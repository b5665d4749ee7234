"""Fuse a model: linear, activation and dropout become one FusedLinear wherever that changes no result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx, nn

from mlpkit.errors import ArgumentError
from mlpkit.nn._plan import Chain, Plan, join
from mlpkit.nn._trace import rewrite
from mlpkit.nn.layers import FusedLinear


@dataclass(frozen=True)
class FuseEntry:
    """One linear layer: ``status`` is fused, fusible or left; ``what`` the fused layer's parts, or the reason."""

    name: str
    status: str
    what: str


@dataclass(frozen=True)
class FuseReport:
    """All linear layers of a model, in its order; prints as a table."""

    entries: tuple[FuseEntry, ...]

    def __str__(self) -> str:
        rows = [("layer", "status", "what or why"), *((one.name, one.status, one.what) for one in self.entries)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {status:<{widths[1]}}  {what}" for name, status, what in rows)


class Absorbed(nn.Module):
    """Passes its input on, in the place of a PReLU that is now part of a fused layer; keeps the parameter's name.

    x: any shape; returns x itself.
    """

    def __init__(self, prelu: nn.PReLU) -> None:
        super().__init__()
        self.weight = prelu.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class LentSlope(FusedLinear):
    """A FusedLinear of prelu whose slope is the ``weight`` of another module, under that module's name in the state."""

    _lender: tuple[nn.Module]  # in a tuple: not a child, so that its parameter is listed once

    @property
    def slope(self) -> nn.Parameter:  # type: ignore[override]
        """The lender's parameter, of one element."""
        return cast(nn.Parameter, self._lender[0].weight)


def fuse(model: nn.Module) -> nn.Module:
    """Same outputs as ``model`` in eval, up to rounding, with each linear, activation and dropout in a row made one op.

    Returns a new model, or ``model`` itself where there is nothing to fuse. The new model holds the old one's parameter
    objects, buffers and all modules that it has no reason to change, so optimizers go on and ``state_dict`` keeps its
    keys; use the old model no more, or fuse a ``copy.deepcopy`` of it. Modes and devices stay as they are.

    In ``nn.Sequential``, nested ones too, the fused layer takes the linear's place and ``nn.Identity`` those of the
    others. A module with a forward of its own is traced by torch.fx; where it has something to fuse, a module with the
    traced forward takes its place, with its attributes but without its other methods. What a forward decides in Python
    is decided at the trace. Activations: those of FusedLinear, as modules, functions or methods, and ``clamp(min=0)``
    (its gradient at exactly 0 becomes relu's, 0). A dropout's p is read now. In training the masks are those of
    ``FusedLinear``, not PyTorch's. What is left, and why: ``fuse_report``.

    Raises ArgumentError when ``model`` is no module.
    """
    _check("fuse", model)
    plan = Plan(model)
    replacements: dict[str, nn.Module] = {}
    for chain in plan.chains:
        _replace(chain, replacements)
    rewritten = {chain.scope: plan.graphs[chain.scope] for chain in plan.chains if chain.nodes}
    return _rebuild("", model, replacements, rewritten)


def fuse_report(model: nn.Module) -> FuseReport:
    """Which linear layers are fused, which ``fuse`` would fuse, and which it leaves and why; changes nothing.

    Raises ArgumentError when ``model`` is no module.
    """
    _check("fuse_report", model)
    plan = Plan(model)
    entries = {path: FuseEntry(path, "left", reason) for path, reason in plan.left.items()}
    entries |= {path: FuseEntry(path, "fused", _parts(layer)) for path, layer in plan.fused.items()}
    for chain in plan.chains:
        p = chain.dropout.p if chain.dropout else 0.0
        activation = chain.activation.name if chain.activation else "identity"
        entries[chain.path] = FuseEntry(chain.path, "fusible", _words(activation, p))
    order = [name for name, _ in model.named_modules(remove_duplicate=False) if name in entries]
    return FuseReport(tuple(entries[name] for name in order))


def _check(owner: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{owner}: model is {type(model).__name__}; it must be an nn.Module")


def _parts(layer: FusedLinear) -> str:
    return _words(layer.activation, layer.dropout)


def _words(activation: str, p: float) -> str:
    return activation + (f", dropout {p:g}" if p else "")


def _replace(chain: Chain, replacements: dict[str, nn.Module]) -> None:
    lender: nn.Module | None = chain.activation.prelu if chain.activation else None
    for path, module in chain.places:
        if isinstance(module, nn.PReLU):
            lender = Absorbed(module)
            replacements[path] = lender.train(module.training)
        else:
            replacements[path] = nn.Identity().train(module.training)
    replacements[chain.path] = _layer(chain, lender)
    if chain.nodes:
        _shorten(chain.nodes)


def _layer(chain: Chain, lender: nn.Module | None) -> FusedLinear:
    linear, activation = chain.linear, chain.activation
    layer = FusedLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        activation=activation.name if activation and lender is None else "identity",
        slope=activation.slope if activation else None,
        dropout=chain.dropout.p if chain.dropout else 0.0,
        device="meta",
    )
    layer.weight = cast(nn.Parameter, linear.weight)
    layer.bias = linear.bias
    if lender is not None:
        del layer.slope
        layer.activation = "prelu"
        layer.__class__ = LentSlope
        layer.__dict__["_lender"] = (lender,)
    return layer.train(chain.training)


def _shorten(nodes: list[fx.Node]) -> None:
    """Let the first call stand for all of them."""
    first, last = nodes[0], nodes[-1]
    arguments = [one for node in nodes for one in node.all_input_nodes]
    last.replace_all_uses_with(first)
    for node in reversed(nodes[1:]):
        node.graph.erase_node(node)
    for one in dict.fromkeys(arguments):
        if one.op == "get_attr" and not one.users:
            one.graph.erase_node(one)


def _rebuild(
    path: str, module: nn.Module, replacements: dict[str, nn.Module], rewritten: dict[str, fx.Graph]
) -> nn.Module:
    """The module with what lies beneath it replaced: itself if that is nothing, else a shallow copy."""
    if path in replacements:
        return replacements[path]
    children = {
        name: None if child is None else _rebuild(join(path, name), child, replacements, rewritten)
        for name, child in module._modules.items()
    }
    if path not in rewritten and all(children[name] is child for name, child in module._modules.items()):
        return module
    new = rewrite(module, rewritten[path]) if path in rewritten else module.__new__(type(module))
    if path not in rewritten:
        new.__dict__.update(vars(module))
    new.__dict__["_modules"] = children
    return new
