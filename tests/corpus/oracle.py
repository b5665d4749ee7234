"""The truth by brute force, without mlpkit: every result of every operation is asked for NaN and Inf."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

_IGNORED = ("empty", "detach", "view", "alias", "t", "transpose", "expand", "slice", "select", "unbind", "split")
_WITH_STATISTICS = ("native_batch_norm",)


class Birth(NamedTuple):
    """An operation whose result holds NaN or Inf though its inputs did not, or NaN where they held Inf."""

    op: str
    phase: str
    step: int


class Oracle(TorchDispatchMode):
    """Births of NaN and Inf in order; the step counts optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.births: list[Birth] = []
        self.step = 0
        self._updating = False

    def __enter__(self) -> Oracle:
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: setattr(self, "_updating", True)),
            register_optimizer_step_post_hook(self._stepped),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _stepped(self, *_: Any) -> None:
        self._updating = False
        self.step += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        inputs = list(_floats([*args, *kwargs.values()]))
        written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        overwrites = name in ("fill_", "copy_", "zero_", "uniform_", "normal_")
        before = inputs[1:] if overwrites else inputs
        clean, no_nan = all(map(_finite, before)), not any(map(_nan, before))
        result = func(*args, **kwargs)
        if name.startswith(_IGNORED) and not any(written):
            return result
        outputs = [*_floats(result if isinstance(result, (list, tuple)) else [result])]
        if any(written):
            outputs += inputs
        if name in _WITH_STATISTICS:
            outputs += [t for t in inputs[3:] if clean]  # running statistics: written, though the schema hides it
        if (clean and not all(map(_finite, outputs))) or (no_nan and any(map(_nan, outputs))):
            backward = torch._C._current_graph_task_id() != -1
            phase = "backward" if backward else "optimizer" if self._updating else "forward"
            self.births.append(Birth(name, phase, self.step))
        return result


def _floats(values: Any) -> Any:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _floats(value)


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _nan(tensor: torch.Tensor) -> bool:
    return bool(torch.isnan(tensor).any())
