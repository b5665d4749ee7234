"""Docstrings of what is public: where tensors go in, they say shapes, dtypes and errors, and name each argument."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = ["functional", "nn", "init", "guard", "guard.optim", "trace", "population", "tune", "reference"]
WORDS = {
    "shape": r"\([^)]*(,|\.\.\.)[^)]*\)|[Ss]calar|shape",
    "dtype": r"dtype|float|int64|bool|bits",
    "errors": r"[Rr]aises|Error|errors",
}


def public(module):
    """Names that a module offers; those without a list say so by where they are defined."""
    listed = getattr(module, "__all__", None)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return listed or [name for name in own if not name.startswith("_")]


def functions():
    """(name, function, docstring) of each public function, constructor and method; a method has its class's too."""
    for name in MODULES:
        module = importlib.import_module(f"mlpkit.{name}")
        for one in public(module):
            value = getattr(module, one)
            text = inspect.getdoc(value) or ""
            if inspect.isclass(value):
                yield f"{name}.{one}", value, text
                for key, method in vars(value).items():
                    if inspect.isfunction(method) and (not key.startswith("_") or key == "__call__"):
                        yield f"{name}.{one}.{key}", method, f"{text}\n{inspect.getdoc(method) or ''}"
            elif callable(value):
                yield f"{name}.{one}", value, text


def missing(function, text):
    """What the docstring of a function that takes tensors does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    tensors = [one.name for one in parameters if re.search(r"\bTensor\b", str(one.annotation))]
    if not tensors:
        return []
    unsaid = [what for what, pattern in WORDS.items() if not re.search(pattern, text)]
    return unsaid + [name for name in tensors if not re.search(rf"\b{name}\b", text)]


def test_docstrings_say_shapes_dtypes_and_errors():
    pytest.importorskip("pandas")
    found = {name: missing(function, text) for name, function, text in functions()}
    assert len(found) > 100
    assert not {name: unsaid for name, unsaid in found.items() if unsaid}


def test_an_empty_docstring_would_be_seen():
    from mlpkit.functional import linear_act_dropout

    assert missing(linear_act_dropout, "Some layer.")[:3] == ["shape", "dtype", "errors"]
    assert "weight" in missing(linear_act_dropout, "Some layer.")


@pytest.mark.parametrize("name", ["functional", "nn", "init", "guard", "trace", "population", "tune"])
def test_the_reference_has_all_that_is_public(name):
    page = (DOCS / f"api-{name}.md").read_text()
    module = importlib.import_module(f"mlpkit.{name}")
    whole = re.search(rf"^::: mlpkit\.{name}$", page, re.MULTILINE) and "members:" not in page
    assert whole or not [one for one in public(module) if not re.search(rf"\b{one}\b", page)]
