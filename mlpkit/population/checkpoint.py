"""A population on disk: a JSON file with everything that is words and numbers, and the tensors it names."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlpkit.errors import DataError, MissingExtraError, OutputError
from mlpkit.population.member import Member
from mlpkit.population.scores import Mark

if TYPE_CHECKING:
    from mlpkit.population.population import Population

FORMAT, VERSION = "mlpkit.population", 2
NAME = "population.json"
_CURVES = ("train_loss", "validation_loss", "metric", "lr")
_COUNTS = (
    "epoch", "step", "taken", "skipped", "skips_in_a_row", "waited", "best_epoch", "stopped_step", "best", "mark",
    "status", "cause", "seconds",
)  # fmt: skip


def write(population: Population, directory: Path) -> None:
    """The JSON is replaced last, and names tensors that are complete by then."""
    tensors: dict[str, Tensor] = {}
    tables: dict[tuple[Any, ...], str] = {}
    members = []
    for index, member in population.members.items():
        tensors[f"{index}"] = population._native.state(index)
        members.append(_member(population, index, member, tensors, tables))
    number = 1 + _number(directory)
    named = f"population-{number}.safetensors"
    words = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": named,
        "loss": population.loss,
        "metric": population.metric,
        "log_target": population.log_target,
        "delta": population.delta,
        "out_features": population.out_features,
        "data": fingerprint(population),
        "members": members,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A file that a killed run left behind is nobody's.
        _replace(directory / named, lambda path: _safetensors().save_file(tensors, path))
        text = json.dumps(words, allow_nan=False)
        _replace(directory / NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))
        for old in directory.glob("population-*.safetensors"):
            if old.name != named:
                old.unlink()
    except OSError as error:
        raise OutputError(f"Population.save: {directory} cannot be written: {error}") from error


def read(kind: type[Population], directory: Path, X: Any, y: Any, settings: dict[str, Any]) -> Population:
    """The inverse; DataError for what is missing, damaged or of other data."""
    words = _words(directory)
    if words.get("format") != FORMAT or words.get("version") != VERSION:
        raise DataError(f"{directory}: {NAME} has format {words.get('format')} version {words.get('version')}")
    try:
        tensors = _safetensors().load_file(str(directory / words["tensors"]))
        members = [_member_of(one, tensors) for one in words["members"]]
        fixed = {key: words[key] for key in ("loss", "metric", "log_target", "delta", "out_features")}
    except MissingExtraError:
        raise
    except Exception as error:  # JSON, safetensors and missing keys each have errors of their own
        raise DataError(f"{directory} holds a damaged population: {str(error).splitlines()[0]}") from error
    population = kind((), X, y, **(fixed | settings))
    if fingerprint(population) != words["data"]:
        raise DataError(f"{directory} was trained on other data: X, y, sample_weight and validation must be the same")
    population.add(members)
    for index, one in enumerate(words["members"]):
        state = population._native.state(index)
        saved = tensors[f"{index}"]
        if saved.shape != state.shape:
            raise DataError(f"{directory} holds a damaged population: member {index} has {saved.numel()} numbers")
        state.copy_(saved)
        _restore(population, index, one, tensors)
    return population


def fingerprint(population: Population) -> list[int]:
    """Sizes and checksums of what the members learn from."""
    found: list[int] = []
    for table in (population.data, population.other):
        for tensor in table or ():
            found += [] if tensor is None else [*tensor.shape, zlib.crc32(tensor.numpy().tobytes())]
    return found


def _member(
    population: Population, index: int, member: Member, tensors: dict[str, Tensor], tables: dict[tuple[Any, ...], str]
) -> dict[str, Any]:
    now = population._native.progress(index)
    recipe = {key: value for key, value in vars(member).items() if key not in ("rows", "validation_rows")}
    recipe["hidden"] = list(member.hidden)
    recipe["dropout"] = list(member.rates) if not isinstance(member.dropout, (int, float)) else member.dropout
    recipe["betas"] = list(member.betas)
    for part in _CURVES:
        tensors[f"{index}.{part}"] = torch.tensor(getattr(now, part), dtype=torch.float64)
    found: dict[str, Any] = {"recipe": recipe, "progress": {key: getattr(now, key) for key in _COUNTS}}
    for field in ("rows", "validation_rows"):
        rows = getattr(member, field)
        if rows is not None:
            found[field] = _table(rows, field, population, tensors, tables)
    found["marks"] = [asdict(mark) for mark in population._marks[index]]
    return found


def _table(
    rows: Any, field: str, population: Population, tensors: dict[str, Tensor], tables: dict[tuple[Any, ...], str]
) -> str:
    from mlpkit.population.data import rows_of

    index = rows_of(rows, len(population.data.x), field)
    key = (len(index), zlib.crc32(index.numpy().tobytes()), id(rows))
    if key not in tables:
        tables[key] = f"rows.{len(tables)}"
        tensors[tables[key]] = index
    return tables[key]


def _member_of(one: dict[str, Any], tensors: dict[str, Tensor]) -> Member:
    recipe = dict(one["recipe"])
    recipe["hidden"], recipe["betas"] = tuple(recipe["hidden"]), tuple(recipe["betas"])
    if isinstance(recipe["dropout"], list):
        recipe["dropout"] = tuple(recipe["dropout"])
    rows: dict[str, Any] = {field: tensors[one[field]] for field in ("rows", "validation_rows") if field in one}
    return Member(**recipe, **rows)


def _restore(population: Population, index: int, one: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    now = population._native.progress(index)
    for key in _COUNTS:
        setattr(now, key, one["progress"][key])
    for part in _CURVES:
        setattr(now, part, tensors[f"{index}.{part}"].tolist())
    population._marks[index] = [Mark(mark["epoch"], mark["changes"]) for mark in one["marks"]]


def _words(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{directory} holds no population: {NAME} cannot be read") from error
    except ValueError as error:
        raise DataError(f"{directory} holds a damaged population: {NAME} is no JSON") from error
    return found


def _number(directory: Path) -> int:
    numbers = [path.stem.rpartition("-")[2] for path in directory.glob("population-*.safetensors")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _replace(path: Path, write_to: Any) -> None:
    new = path.with_name(f".{path.name}.new")
    write_to(str(new))
    os.replace(new, path)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError("saving a population needs safetensors: pip install 'mlpkit[tune]'") from error
    return safetensors.torch
