"""The watch level: hooks that fill the ring, and the escalation from a bad step to the operation behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import proxy, ref

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mlpkit import _C
from mlpkit.trace._diagnosis import Diagnosis
from mlpkit.trace._held import Held
from mlpkit.trace._numbers import short
from mlpkit.trace._watch import Warned, Watch
from mlpkit.trace._where import follow_modules

_MOST_HELD = 16  # calls of a root in one step


class Watching:
    """Watches one thread's modules and optimizers; ``observe`` makes a tracer for a step's replay."""

    def __init__(self, model: torch.nn.Module | None, observe: Callable[[int, torch.nn.Module | None], Any]) -> None:
        # The native half lives no longer than this one, and must not keep it alive.
        self._outputs = _C.Outputs(proxy(self))
        self.watch = Watch(self._outputs)
        self.found: list[Diagnosis] = []
        self.counting = True
        self.observing: Any = None  # the tracer that follows once a step could not be replayed
        self._model = model
        self._observe = observe
        self._modules: dict[int, ref[torch.nn.Module]] = {}
        self._held: list[Held] = []
        self._bad = ""
        self._answered = False
        self._ended = False
        self._closing = False
        self.on_step: Callable[[], None] = lambda: None
        self._removers: list[Callable[[], None]] = []
        self._known: dict[int, tuple[list[str], list[torch.Tensor], list[str], list[torch.Tensor]]] = {}
        self._roots: dict[int, ref[torch.nn.Module]] = {}
        self._own: dict[int, list[torch.Tensor]] = {}  # parameters of each root

    @property
    def step(self) -> int:
        """The step that runs."""
        return self.watch.row.step

    def open(self) -> None:
        """Attach all hooks."""
        for hook in (
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        ):
            self._removers.append(hook.remove)
        self._removers += [self._outputs.stop, follow_modules(self._outputs)]
        if self._model is not None:
            self._adopt(self._model)

    def close(self) -> None:
        """Detach everything; judge what is left."""
        self._closing = True
        if self._bad:
            self._answer()
        if self.observing is not None:
            self.observing.__exit__(None, None, None)
        while self._removers:
            self._removers.pop()()
        if self.watch.begun:
            self.watch.end_step()

    def next_step(self) -> None:
        """Begin the next step."""
        if self._bad:
            self._answer()
        self.watch.end_step()
        self._held, self._ended, self._answered = [], False, False
        if self.observing is not None:
            self.observing.next_step()
        self.on_step()

    @property
    def steps(self) -> int:
        """Steps seen so far."""
        return max(1, self.watch.row.step + self.watch.begun)

    def healthy(self, raised: str | None) -> Diagnosis:
        """The verdict of a run in which nothing was found."""
        count = "1 step" if self.steps == 1 else f"{self.steps} steps"
        sentence = f"No failure in {count}: no output of a module, gradient, parameter or buffer held NaN or Inf."
        if raised:
            sentence += f" The program ended with {raised}."
        return Diagnosis("healthy", sentence, evidence={"steps": self.steps})

    def diagnoses(self) -> list[Diagnosis]:
        """Failures found by replay, then warnings."""
        later = self.observing.diagnoses if self.observing is not None else []
        return [*self.found, *later, *(_warning(one) for one in self.watch.warnings.values())]

    # Hooks.

    def _adopt(self, root: torch.nn.Module) -> None:
        for name, module in root.named_modules():
            self._modules[id(module)] = ref(module, partial(self._gone, id(module)))
            self._outputs.adopt(module, name)
        self._roots[id(root)] = ref(root)
        self._own[id(root)] = [one for one in root.parameters() if not one.is_inference()]

    def _gone(self, key: int, weak: object) -> None:
        if self._modules.get(key) is weak:
            del self._modules[key]
            self._outputs.forget(key)

    def entered(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An outermost module is called."""
        if self._ended and self.counting:
            self.next_step()
        known = self._roots.get(id(module))
        if known is None or known() is not module:
            self._adopt(module)
        if len(self._held) < _MOST_HELD:
            self._held.append(Held(module, args, kwargs, self._own[id(module)]))

    def left(self, module: torch.nn.Module, output: Any) -> None:
        """It has returned."""
        if self._held and self._held[-1].root is module:
            self._held[-1].listen(output)

    def bad_output(self, name: str) -> None:
        """The output of a module holds NaN or Inf."""
        self._bad = self._bad or f"the output of `{name}`"

    def _tensors_of(self, optimizer: Optimizer) -> tuple[list[str], list[torch.Tensor], list[str], list[torch.Tensor]]:
        """Names and parameters of an optimizer, then of the roots' buffers."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        known = self._known.get(id(optimizer))
        if known is not None and len(known[1]) == len(parameters) and known[1][0] is parameters[0]:
            return known
        names: dict[int, str] = {}
        buffers: dict[str, torch.Tensor] = {}
        for weak in self._roots.values():
            root = weak()
            if root is not None:
                names.update((id(one), name) for name, one in root.named_parameters())
                buffers.update((name, one) for name, one in root.named_buffers() if one.is_floating_point())
        own = [names.get(id(one), f"parameter {index}") for index, one in enumerate(parameters)]
        known = self._known[id(optimizer)] = own, parameters, list(buffers), list(buffers.values())
        return known

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._outputs.paused:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # a gradient scaler lets the optimizer skip by itself
        names, parameters, _, _ = self._tensors_of(optimizer)
        if self.watch.gradients(names, [one.grad for one in parameters]) and not self._bad:
            name = next(name for kind, name in self.watch.row.bad() if kind == "gradient")
            self._bad = f"the gradient of `{name}`"
        if self._bad:
            self._answer()

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._outputs.paused:
            return
        names, parameters, buffer_names, buffers = self._tensors_of(optimizer)
        if self.watch.parameters([*names, *buffer_names], [*parameters, *buffers]) and not self._answered:
            name = next(name for kind, name in self.watch.row.bad() if kind == "parameter")
            self._say(f"`{name}`", "the update itself has been made", name)
        self._ended = True

    # From a bad step to its operation.

    def _answer(self) -> None:
        """Replay the step's calls under observe; where that explains nothing, observe what follows."""
        what, self._bad = self._bad, ""
        if self._answered or self.observing is not None:
            return
        self._answered = self._outputs.paused = True
        try:
            why = self._replay()
            if not why:
                return
        finally:
            self._outputs.paused = False
        self._say(what, why, "")

    def _replay(self) -> str:
        """Run the step's calls again; says why that explains nothing, or nothing at all."""
        if any(held.changed() for held in self._held):
            return "inputs or parameters were changed in place since"
        for held in self._held:
            tracer = self._observe(self.step, self._model or held.root)
            try:
                held.replay(tracer)
            except Exception as error:  # noqa: BLE001 - whatever the model raises must not end the program
                return f"running the model again raised {type(error).__name__}"
            failures = [one for one in tracer.diagnoses if one.verdict == "failure"]
            self.found += failures
            if failures:
                return ""
        return "it did not arise inside the modules"

    def _say(self, what: str, why: str, module: str) -> None:
        self._answered = True
        sentence = f"Step {self.step}: {what} holds NaN or Inf; the step cannot be replayed ({why})"
        if self.observing is None and not self._closing:
            self.observing = self._observe(self.step, self._model)
            self.observing.__enter__()
            sentence += "; the steps that follow are observed"
        self.found.append(Diagnosis("failure", sentence + ".", self.step, module=module.rpartition(".")[0]))


def _warning(one: Warned) -> Diagnosis:
    what = {"output": "", "gradient": "the gradient of ", "parameter": ""}[one.kind]
    name = one.name or "the model"
    steps = "1 step" if one.steps_left == 1 else f"{one.steps_left} steps"
    sentence = (
        f"Step {one.step}: {what}`{name}` will pass {short(one.limit)} in about {steps}; it is {short(one.absmax)} now."
    )
    module = one.name if one.kind == "output" else one.name.rpartition(".")[0]
    phase = {"output": "forward", "gradient": "backward", "parameter": "optimizer"}[one.kind]
    evidence = {
        "kind": one.kind,
        "name": one.name,
        "absmax": one.absmax,
        "limit": one.limit,
        "steps_left": one.steps_left,
    }
    return Diagnosis("warning", sentence, one.step, phase, module=module, cause="explosion", evidence=evidence)
