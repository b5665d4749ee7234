"""The tuned model on raw tables: predict, score, save, load. Weights are safetensors, the rest JSON: no pickle."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlpkit.errors import ArgumentError, DataError, ShapeError
from mlpkit.report._extras import require
from mlpkit.tune import trainer
from mlpkit.tune.calibration import softmax
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.problem import decode_target
from mlpkit.tune.spec import Spec
from mlpkit.tune.table import Column, clean, pandas, to_frame
from mlpkit.tune.target import Label, Task

_FORMAT = "mlpkit-model"
_VERSION = 1
_BLOCK = 65536


@dataclass(frozen=True)
class Member:
    """One network of an average: its architecture and how much it counts.

    inputs: (first, end) of the encoder's inputs that it takes; None: all.
    """

    hidden: tuple[int, ...]
    activation: str
    norm: str | None
    dropout: float | tuple[float, ...]
    weight: float
    inputs: tuple[int, int] | None = None


@dataclass
class TunedModel:
    """A network with its preprocessing: takes tables as they came, missing cells and unseen categories included.

    Attributes: ``model`` (an nn.Module on encoded inputs), ``task``, ``classes_`` (labels, empty for a regression),
    ``columns``, ``encoder``, ``hidden``, ``target_name``; a regression's output is scaled back by ``target_scale``.
    ``members``: of an average of networks, else empty. ``temperature`` divides the logits of classes. ``interval``: the
    5 % and 95 % quantiles of a regression's errors on unseen rows, in units of the network's output.
    """

    model: nn.Module
    task: Task
    target_name: str
    classes: tuple[Label, ...]
    columns: Sequence[Column]
    encoder: Encoder
    hidden: tuple[int, ...]
    activation: str = "relu"
    norm: str | None = None
    dropout: float | tuple[float, ...] = 0.0
    target_mean: float = 0.0
    target_scale: float = 1.0
    log_target: bool = False
    members: tuple[Member, ...] = ()
    temperature: float = 1.0
    interval: tuple[float, float] | None = None

    @property
    def classes_(self) -> npt.NDArray[Any]:
        """The class labels, in the order of ``predict_proba``'s columns."""
        if all(isinstance(label, str) for label in self.classes):
            return np.array(self.classes, dtype=object)
        return np.array(self.classes)

    @property
    def feature_names_in_(self) -> list[str]:
        """Names of the input columns that are used."""
        return [column.name for column in self.columns]

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Labels (classification) or numbers (regression), one per row of ``X``."""
        output = self._output(X)
        if self.task == "classification":
            labels: npt.NDArray[Any] = self.classes_[output.argmax(1)]
            return labels
        return decode_target(output[:, 0], self.target_mean, self.target_scale, self.log_target)

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """(rows, classes) calibrated probabilities that sum to 1; ArgumentError for a regression."""
        if self.task != "classification":
            raise ArgumentError("predict_proba: this is a regression model; use predict")
        return softmax(self._output(X), self.temperature)

    def uncertainty(self, X: Any, *, samples: int = 50, seed: int = 0) -> Any:
        """How far each prediction can be trusted, as a DataFrame; see ``mlpkit.tune.uncertainty``.

        Classes: "uncertainty" (entropy of the calibrated probabilities, 0 to 1) and, where there are several networks
        or dropout, "disagreement" (mutual information, 0 to 1). Numbers: "low", "high" (90 % interval) and "spread"
        (standard deviation between networks and dropout masks). samples, seed: of the dropout masks.
        """
        from mlpkit.tune.uncertainty import uncertainty

        return uncertainty(self, X, samples, seed)

    def score(self, X: Any, y: Any) -> float:
        """Accuracy or R2 on labelled rows."""
        truth = np.asarray(y)
        predicted = self.predict(X)
        if truth.shape != predicted.shape:
            raise ShapeError(f"score: {len(predicted)} rows of X, but y has shape {truth.shape}")
        if self.task == "classification":
            return float(np.mean(truth.astype(object) == predicted.astype(object)))
        total = float(np.sum((truth - truth.mean()) ** 2))
        return 1.0 - float(np.sum((truth - predicted) ** 2)) / total

    def export(self) -> nn.Module:
        """The network on the inputs that ``encoder`` makes: an nn.Sequential of stock PyTorch modules.

        For an average of networks a small module around several of those; its softmax are the averaged probabilities.
        """
        plain: nn.Module = self.model.to_sequential()  # type: ignore[operator]
        return plain.eval()

    def export_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the network as an ONNX file: encoded inputs (rows, in_features) float32 in, logits or numbers out.

        What ``encoder``, ``temperature`` and the target's scale do is not part of it; model.json has them. Raises
        MissingExtraError without onnxscript.
        """
        from mlpkit.interop.onnx import export

        example = torch.zeros(2, len(self.encoder.feature_names))
        export(copy.deepcopy(self.export()).float(), example, path)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``model.json`` into an existing directory."""
        save_file = require("safetensors.torch", "saving a model").save_file
        state = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        state = {name: value.float() if value.dtype == torch.float64 else value for name, value in state.items()}
        save_file(state, str(Path(directory) / "model.safetensors"), metadata={"format": _FORMAT})
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (Path(directory) / "model.json").write_text(text + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "task": self.task,
            "target": {
                "name": self.target_name,
                "mean": self.target_mean,
                "scale": self.target_scale,
                "log": self.log_target,
            },
            "classes": list(self.classes),
            "network": {
                "in_features": len(self.encoder.feature_names),
                "hidden": list(self.hidden),
                "out_features": max(1, len(self.classes)),
                "activation": self.activation,
                "norm": self.norm,
                "dropout": _rates(self.dropout),
            },
            "members": [{**asdict(member), "dropout": _rates(member.dropout)} for member in self.members],
            "temperature": self.temperature,
            "interval": None if self.interval is None else list(self.interval),
            "columns": [{"name": column.name, "kind": column.kind} for column in self.columns],
            "encoder": self.encoder.to_dict(),
        }

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> TunedModel:
        """Read what ``save`` wrote. DataError if the directory holds no such model or a damaged one."""
        folder = Path(directory)
        for name in ("model.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise DataError(f"{folder} is no run directory: it has no {name}")
        load_file = require("safetensors.torch", "loading a model").load_file
        try:
            data = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            if data["format"] != _FORMAT or data["version"] != _VERSION:
                raise DataError(f"{folder}: model.json has format {data['format']} version {data['version']}")
            tuned = cls._from_dict(data)
            tuned.model.load_state_dict(load_file(str(folder / "model.safetensors")))
        except DataError:
            raise
        except Exception as error:
            # JSON, safetensors and load_state_dict each have their own errors for a damaged file.
            raise DataError(f"{folder} holds a damaged model: {str(error).splitlines()[0]}") from error
        return tuned

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> TunedModel:
        network, target = data["network"], data["target"]
        hidden = tuple(network["hidden"])
        out_features = network["out_features"] if data["task"] == "classification" else 0
        members = tuple(_member(item) for item in data.get("members", []))
        single = _member({**network, "weight": 1.0})
        networks = [_build(item, network["in_features"], out_features) for item in members or (single,)]
        interval = data.get("interval")
        return cls(
            model=_whole(networks, members, bool(out_features)).eval(),
            task=data["task"],
            target_name=target["name"],
            classes=tuple(data["classes"]),
            columns=[Column(item["name"], item["kind"]) for item in data["columns"]],
            encoder=Encoder.from_dict(data["encoder"]),
            hidden=hidden,
            activation=network["activation"],
            norm=network.get("norm"),
            dropout=single.dropout,
            target_mean=target["mean"],
            target_scale=target["scale"],
            log_target=target.get("log", False),
            members=members,
            temperature=float(data.get("temperature", 1.0)),
            interval=None if interval is None else (float(interval[0]), float(interval[1])),
        )

    def inputs(self, X: Any) -> torch.Tensor:
        """Raw rows as the network takes them: (rows, in_features), its dtype."""
        encoded = self.encoder.transform(clean(to_frame(X), self.columns))
        return torch.from_numpy(encoded).to(next(self.model.parameters()).dtype)

    def _output(self, X: Any) -> npt.NDArray[np.float64]:
        inputs = self.inputs(X)
        self.model.eval()
        with torch.inference_mode():
            # In blocks, so that a table larger than memory's worth of activations still passes.
            parts = [self.model(inputs[at : at + _BLOCK]) for at in range(0, len(inputs), _BLOCK)]
        width = max(1, len(self.classes))
        output: npt.NDArray[np.float64] = (torch.cat(parts) if parts else torch.empty(0, width)).double().numpy()
        return output

    def table(self, X: Any) -> Any:
        """Predictions as a DataFrame: the target's name, and for classes one column of probability per label."""
        frame = pandas().DataFrame({self.target_name: self.predict(X)})
        if self.task == "classification":
            chances = self.predict_proba(X)
            for index, label in enumerate(self.classes):
                frame[f"probability of {label}"] = chances[:, index]
        return frame


def _rates(dropout: float | tuple[float, ...]) -> float | list[float]:
    return dropout if isinstance(dropout, int | float) else list(dropout)


def _member(item: Mapping[str, Any]) -> Member:
    rate = item.get("dropout", 0.0)
    dropout = tuple(rate) if isinstance(rate, list) else float(rate)
    inputs = (int(item["inputs"][0]), int(item["inputs"][1])) if item.get("inputs") else None
    return Member(tuple(item["hidden"]), item["activation"], item.get("norm"), dropout, float(item["weight"]), inputs)


def _build(member: Member, in_features: int, out_features: int) -> nn.Module:
    spec = Spec(
        member.hidden, 0.0, 0.0, 1, 0, activation=member.activation, norm=member.norm, dropout=member.dropout
    )  # fmt: skip
    if member.inputs is None:
        return trainer.build(spec, in_features, out_features)
    from mlpkit.tune.ensemble import Sliced

    first, end = member.inputs
    return Sliced(trainer.build(spec, end - first, out_features), first, end)


def _whole(networks: Sequence[nn.Module], members: Sequence[Member], classes: bool) -> nn.Module:
    if not members:
        return networks[0]
    from mlpkit.tune.ensemble import Average

    return Average(networks, [member.weight for member in members], classes=classes)
