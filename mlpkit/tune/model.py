"""The tuned model on raw tables: predict, score, save, load. Weights are safetensors, the rest JSON: no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlpkit.errors import ArgumentError, DataError, ShapeError
from mlpkit.report._extras import require
from mlpkit.tune import trainer
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.problem import decode_target
from mlpkit.tune.spec import Spec
from mlpkit.tune.table import Column, clean, pandas, to_frame
from mlpkit.tune.target import Label, Task

_FORMAT = "mlpkit-model"
_VERSION = 1
_BLOCK = 65536


@dataclass
class TunedModel:
    """A network with its preprocessing: takes tables as they came, missing cells and unseen categories included.

    Attributes: ``model`` (an nn.Module on encoded inputs), ``task``, ``classes_`` (labels, empty for a regression),
    ``columns``, ``encoder``, ``hidden``, ``target_name``; a regression's output is scaled back by ``target_scale``.
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
        """(rows, classes) probabilities that sum to 1; ArgumentError for a regression."""
        if self.task != "classification":
            raise ArgumentError("predict_proba: this is a regression model; use predict")
        return probabilities(self._output(X))

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

    def export(self) -> nn.Sequential:
        """The network as stock PyTorch modules, on the inputs that ``encoder`` makes."""
        plain: nn.Sequential = self.model.to_sequential()  # type: ignore[operator]
        return plain.eval()

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
                "dropout": self.dropout if isinstance(self.dropout, float) else list(self.dropout),
            },
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
        rate = network.get("dropout", 0.0)
        spec = Spec(
            hidden, 0.0, 0.0, 1, 0, activation=network["activation"], norm=network.get("norm"),
            dropout=tuple(rate) if isinstance(rate, list) else float(rate),
        )  # fmt: skip
        return cls(
            model=trainer.build(spec, network["in_features"], out_features).eval(),
            task=data["task"],
            target_name=target["name"],
            classes=tuple(data["classes"]),
            columns=[Column(item["name"], item["kind"]) for item in data["columns"]],
            encoder=Encoder.from_dict(data["encoder"]),
            hidden=hidden,
            activation=network["activation"],
            norm=network.get("norm"),
            dropout=spec.dropout,
            target_mean=target["mean"],
            target_scale=target["scale"],
            log_target=target.get("log", False),
        )

    def _output(self, X: Any) -> npt.NDArray[np.float64]:
        frame = to_frame(X)
        inputs = self.encoder.transform(clean(frame, self.columns))
        self.model.eval()
        with torch.inference_mode():
            # In blocks, so that a table larger than memory's worth of activations still passes.
            kind = next(self.model.parameters()).dtype
            blocks = (torch.from_numpy(inputs[at : at + _BLOCK]).to(kind) for at in range(0, len(inputs), _BLOCK))
            parts = [self.model(block) for block in blocks]
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


def probabilities(output: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Softmax over the last axis."""
    shifted = np.exp(output - output.max(axis=1, keepdims=True, initial=-np.inf))
    normal: npt.NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return normal
