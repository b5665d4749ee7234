"""A whole training run in one value: kept in memory to roll back to, or in a file that is whole or not there at all."""

from __future__ import annotations

import copy
import json
import os
import secrets
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError, DataError, MlpkitError, OutputError
from mlpkit.guard.census import local
from mlpkit.guard.ranks import unwrapped
from mlpkit.guard.replay import random_state
from mlpkit.guard.state import parameters_of

_VERSION = 1
_SAFETENSORS = ".safetensors"
_PARTS = {"model": dict, "optimizer": dict, "scheduler": dict | None, "step": dict, "random": list}
_PLAIN = (type(None), bool, int, float, str)
_TREES = (dict, OrderedDict, Counter, list, tuple)


class Run(Protocol):
    """What can be kept: a ``TrainStep``, or anything with these parts."""

    @property
    def model(self) -> nn.Module:
        """Its parameters and buffers are kept."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its state and settings are kept."""

    @property
    def scheduler(self) -> Any:
        """Its ``state_dict`` is kept, unless it is None."""

    def state_dict(self) -> dict[str, Any]:
        """Counters and scale."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""


class Snapshot:
    """Parameters, buffers, optimizer, scheduler, counters, scale and random state of a run, copied.

    Usage::

        guard.Snapshot.take(step).save("run.pt")  # or run.safetensors; under DDP and FSDP2 one file a rank
        guard.Snapshot.load("run.pt").restore(step)  # goes on bit for bit

    Sharded tensors are kept as this rank's shards.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    @classmethod
    def take(cls, run: Run) -> Snapshot:
        """Copy everything of a run; an accumulation under way is not part of it. Syncs on CUDA for the random state."""
        own = run.scheduler.state_dict() if run.scheduler is not None else None
        state = {
            "version": _VERSION,
            "model": {name: _copied(tensor) for name, tensor in _tensors_of(run.model).items()},
            "optimizer": _optimizer_state(run),
            "classes": _classes(run),
            "scheduler": _map(_copied, own),
            "step": run.state_dict(),
            "random": [_copied(one) for one in random_state(_device_of(run.model))],
        }
        return cls(state)

    @property
    def step(self) -> int:
        """How many steps the run had made."""
        return int(self.state["step"]["steps"])

    @property
    def finite(self) -> bool:
        """Whether all parameters, buffers and optimizer state are."""
        return self.finite_but_for(())

    def finite_but_for(self, sentinels: Collection[str]) -> bool:
        """Whether all are, but for buffers of these names, which hold Inf on purpose."""
        meant = {_plain_name(name) for name in sentinels}
        tensors: list[Tensor] = []
        model = [tensor for name, tensor in self.state["model"].items() if name not in meant]
        _map(tensors.append, [model, self.state["optimizer"]])
        return all(bool(torch.isfinite(one).all()) for one in tensors if one.is_floating_point())

    def restore(self, run: Run, *, counters: bool = True) -> None:
        """Put everything back, in place; ``counters=False`` leaves step counts, scale and random state as they are.

        Raises ArgumentError naming what does not fit, before anything changes: another model, optimizer or scheduler.
        """
        model = _tensors_of(run.model)
        saved = self.state["model"]
        self._check_fits(run, model)
        # What may refuse by itself comes first.
        if counters:
            run.load_state_dict(self.state["step"])
        if run.scheduler is not None:
            run.scheduler.load_state_dict(_map(_copied, self.state["scheduler"]))
        _restore_optimizer(run.optimizer, self.state["optimizer"])
        with torch.no_grad():
            for name, tensor in model.items():
                local(tensor).copy_(saved[name])
        if counters:
            states = self.state["random"]
            torch.set_rng_state(states[0].cpu())
            if len(states) > 1:
                torch.cuda.set_rng_state(states[1].cpu(), _device_of(run.model))

    def _check_fits(self, run: Run, model: Mapping[str, Tensor]) -> None:
        what, saved = "Snapshot.restore: the snapshot is of", self.state["model"]
        wrong = sorted(model.keys() ^ saved.keys()) or [n for n in model if local(model[n]).shape != saved[n].shape]
        if wrong:
            raise ArgumentError(f"{what} another model; {wrong[0]!r} does not fit")
        for name, tensor in model.items():
            if tensor.dtype != saved[name].dtype:
                raise ArgumentError(f"{what} another dtype; {name!r} was {saved[name].dtype} and is {tensor.dtype}")
        classes = self.state.get("classes", {})
        for part, now in _classes(run).items():
            before = classes.get(part, now)
            if before != now:
                raise ArgumentError(f"{what} another {part}: it was {before or 'none'} and is {now or 'none'}")
        if (run.scheduler is None) != (self.state["scheduler"] is None):
            with_or_without = "without" if self.state["scheduler"] is None else "with"
            raise ArgumentError(f"{what} a run {with_or_without} scheduler; this one is not")
        _check_optimizer(run, self.state["optimizer"])

    def save(self, path: str | os.PathLike[str], *, before_it_appears: Callable[[], None] | None = None) -> Path:
        """Write one file, whole or not at all: by safetensors where it is called ``*.safetensors``, else by torch.save.

        before_it_appears: called when all is written, before the file gets its name. Raises OutputError where it cannot
        be written, ArgumentError naming what no file can hold, MissingExtraError without safetensors.
        """
        target = Path(path)
        for part, content in self.state.items():
            _check_storable(part, content)
        write = _write_safetensors if target.suffix == _SAFETENSORS else torch.save
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            name = os.fspath(target.with_name(f".{target.name}.{secrets.token_hex(8)}"))
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = os.stat(name).st_mode & 0o777  # as the umask allows
            try:
                try:
                    write(self.state, name)
                except (OSError, MlpkitError):
                    raise
                except Exception as error:
                    # The writers' own classes, for a disk that is full as for any other failure.
                    raise OutputError(f"cannot write {target}: {error}") from error
                with open(name, "rb") as written:
                    os.fsync(written.fileno())
                if before_it_appears is not None:
                    before_it_appears()
                os.chmod(name, mode)
                os.replace(name, target)
            except BaseException:
                os.unlink(name)
                raise
        except MlpkitError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read a file of ``save``; nothing in it is executed. Raises DataError for what is no snapshot."""
        source = Path(path)
        try:
            if source.suffix == _SAFETENSORS:
                state = _read_safetensors(source)
            else:
                state = torch.load(source, weights_only=True, map_location="cpu")
        except MlpkitError:
            raise
        except Exception as error:
            # A damaged file makes its reader raise nearly anything.
            raise DataError(f"Snapshot.load: {source} cannot be read: {error}") from error
        if not isinstance(state, dict) or state.get("version") != _VERSION:
            raise DataError(f"Snapshot.load: {source} is not a snapshot of version {_VERSION}")
        for part, kind in _PARTS.items():
            if part not in state or not isinstance(state[part], kind):
                raise DataError(f"Snapshot.load: {source} is no whole snapshot: it has no {part}")
        if not isinstance(state["step"].get("steps"), int) or not {"state", "groups"} <= state["optimizer"].keys():
            raise DataError(f"Snapshot.load: {source} is no whole snapshot: counts or optimizer are not whole")
        return cls(state)


def rank_path(path: str | os.PathLike[str], rank: int, size: int) -> Path:
    """The file of one rank: ``run.pt`` alone, ``run.rank1.pt`` among others."""
    whole = Path(path)
    return whole if size == 1 else whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}")


def _device_of(model: nn.Module) -> torch.device:
    return next(local(parameter).device for parameter in model.parameters())


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also buffers that a ``state_dict`` leaves out; without wrappers' names."""
    inner = unwrapped(model)
    found = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    return {_plain_name(name): tensor for name, tensor in found.items()}


def _plain_name(name: str) -> str:
    """Without the wrapper of a compiled submodule."""
    return name.replace("_orig_mod.", "")


def _copied(value: Any) -> Any:
    return local(value).detach().clone() if isinstance(value, Tensor) else value


def _map(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree of dicts, lists and tuples with its tensors changed; NumPy's scalars as numbers, others copied."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        # A copy keeps what a class of dict has of its own.
        changed = copy.copy(tree)
        for key, value in tree.items():
            changed[key] = _map(change, value)
        return changed
    if isinstance(tree, (list, tuple)):
        values = [_map(change, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(tree, numpy.generic):
        return tree.item()
    return tree if isinstance(tree, _PLAIN) or callable(tree) else copy.deepcopy(tree)


def _check_storable(place: str, tree: Any) -> None:
    """Raises ArgumentError for what ``load`` could not read without running code."""
    if isinstance(tree, Tensor) or type(tree) in _PLAIN:
        return
    if type(tree) not in _TREES:
        raise ArgumentError(
            f"Snapshot.save: {place} is a {type(tree).__module__}.{type(tree).__qualname__}; a file can hold tensors, "
            "numbers, strings and None, in lists, tuples and dicts"
        )
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        _check_storable(f"a key of {place}", key)
        _check_storable(f"{place}[{key!r}]", value)


def _classes(run: Run) -> dict[str, str | None]:
    return {
        "optimizer": type(run.optimizer).__name__,
        "scheduler": None if run.scheduler is None else _class_of(run.scheduler),
    }


def _class_of(scheduler: Any) -> str:
    """Its name, with those that it is made of."""
    parts = ", ".join(_class_of(one) for one in getattr(scheduler, "_schedulers", ()))
    return f"{type(scheduler).__name__}({parts})" if parts else type(scheduler).__name__


def _names_of(run: Run) -> list[str | None]:
    """The model's names of the optimizer's parameters, in the optimizer's order."""
    names = {id(tensor): name for name, tensor in _tensors_of(run.model).items()}
    return [names.get(id(parameter)) for parameter in parameters_of(run.optimizer)]


def _optimizer_state(run: Run) -> dict[str, Any]:
    """State by the parameters' position, settings by group: plain tensors and values."""
    optimizer = run.optimizer
    state = [_map(_copied, dict(optimizer.state.get(parameter, {}))) for parameter in parameters_of(optimizer)]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": state, "groups": _map(_copied, groups), "names": _names_of(run)}


def _check_optimizer(run: Run, saved: Mapping[str, Any]) -> None:
    optimizer, names = run.optimizer, _names_of(run)
    if len(names) != len(saved["state"]) or len(optimizer.param_groups) != len(saved["groups"]):
        raise ArgumentError("Snapshot.restore: the snapshot is of an optimizer with other parameters or groups")
    for now, before in zip(names, saved.get("names", names)):
        if now != before:
            raise ArgumentError(
                f"Snapshot.restore: the snapshot is of an optimizer with parameters in another order; {before!r} was "
                f"where {now!r} is"
            )
    for group, settings in zip(optimizer.param_groups, saved["groups"]):
        # Others may come during training; what the optimizer begins with is always there.
        lacking = sorted((optimizer.defaults.keys() & group.keys()) - settings.keys())
        if lacking:
            raise ArgumentError(f"Snapshot.restore: the snapshot is of another optimizer, without {lacking[0]!r}")


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    owners = [settings for group, settings in zip(optimizer.param_groups, saved["groups"]) for _ in group["params"]]
    for parameter, settings, entries in zip(parameters_of(optimizer), owners, saved["state"]):
        if not entries:
            optimizer.state.pop(parameter, None)
            continue
        now = optimizer.state[parameter]
        for key in now.keys() - entries.keys():
            del now[key]
        on_device = bool(settings.get("fused") or settings.get("capturable"))
        for key, value in entries.items():
            held = now.get(key)
            if isinstance(value, Tensor) and isinstance(held, Tensor) and local(held).shape == value.shape:
                with torch.no_grad():
                    local(held).copy_(value)
                if key == "step" and on_device:
                    now[key] = held.to(local(parameter).device)
            else:
                now[key] = _like(parameter, _map(_copied, value), stays=key == "step" and not on_device)
    for group, settings in zip(optimizer.param_groups, saved["groups"]):
        for key in group.keys() - settings.keys() - {"params"}:
            del group[key]
        group.update(_map(_copied, settings))


def _like(parameter: Tensor, value: Any, *, stays: bool) -> Any:
    """State for a parameter: on its device unless it stays, and sharded as the parameter is."""
    if not isinstance(value, Tensor) or stays:
        return value
    if local(parameter) is parameter or local(parameter).shape != value.shape:
        return value.to(local(parameter).device)
    from torch.distributed.tensor import DTensor

    whole: Any = parameter
    value = value.to(local(parameter).device)
    return DTensor.from_local(
        value, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _write_safetensors(state: dict[str, Any], path: str) -> None:
    from mlpkit.report._extras import require

    tensors: dict[str, Tensor] = {}

    def name(tensor: Tensor) -> dict[str, str]:
        key = f"tensor.{len(tensors)}"
        tensors[key] = tensor.contiguous()
        return {"__tensor__": key}

    outline = json.dumps(_marked(_map(name, state)))
    require("safetensors.torch", "a .safetensors snapshot", "tune").save_file(tensors, path, metadata={"run": outline})


def _read_safetensors(path: Path) -> dict[str, Any]:
    from mlpkit.report._extras import require

    require("safetensors.torch", "a .safetensors snapshot", "tune")
    with require("safetensors", "a .safetensors snapshot", "tune").safe_open(path, "pt") as source:
        outline = json.loads((source.metadata() or {})["run"])
        state: dict[str, Any] = _unmarked(outline, source.get_tensor)
    return state


def _marked(tree: Any) -> Any:
    """JSON keeps neither tuples nor keys that are numbers: both are marked. Raises TypeError for other objects."""
    if isinstance(tree, tuple):
        return {"__tuple__": [_marked(value) for value in tree]}
    if isinstance(tree, list):
        return [_marked(value) for value in tree]
    if isinstance(tree, Counter):
        return {"__counter__": [[_marked(key), _marked(value)] for key, value in tree.items()]}
    if isinstance(tree, dict) and not all(isinstance(key, str) for key in tree):
        return {"__items__": [[_marked(key), _marked(value)] for key, value in tree.items()]}
    return {key: _marked(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _unmarked(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unmarked(value, tensor) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "__tensor__" in tree:
        return tensor(tree["__tensor__"])
    if "__tuple__" in tree:
        return tuple(_unmarked(value, tensor) for value in tree["__tuple__"])
    if "__counter__" in tree:
        return Counter({_unmarked(key, tensor): _unmarked(value, tensor) for key, value in tree["__counter__"]})
    if "__items__" in tree:
        return {_unmarked(key, tensor): _unmarked(value, tensor) for key, value in tree["__items__"]}
    return {key: _unmarked(value, tensor) for key, value in tree.items()}
