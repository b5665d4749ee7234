"""The pages of errors, read from the sources: one for each class, with an anchor for each message that is raised.

mkdocs calls this as a hook. Words about the classes stand here; everything else follows from the ``raise`` statements.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlpkit"
CLASSES = {
    "ArgumentError": "An argument has a value that the function cannot take, or arguments that do not go together. "
    "The message names the argument, what it was and what it must be. It is a `ValueError` too.",
    "BuildError": "The native extension is missing, or was built for another torch: in mlpkit's folder, in the "
    "environment with the torch you want, `pip install --no-build-isolation --force-reinstall --no-deps .` It is an "
    "`ImportError` too.",
    "DataError": "A table, a file or a directory cannot be used as it is. It is a `ValueError` too.",
    "DeviceError": "Tensors lie on different devices, or on one that mlpkit has no kernel for; on other devices use "
    "`model.to_sequential()`, which is stock PyTorch. It is a `ValueError` too.",
    "DtypeError": "A dtype is not supported, or two dtypes do not fit each other. Layers do not convert by "
    "themselves: use autocast, or `precision=` of [TrainStep](../guard.md#half-precision). It is a `TypeError` too.",
    "MissingExtraError": "An optional package is not installed; the message holds the pip line. From a clone: "
    '`pip install --no-build-isolation ".[report]"` and the like. It is an `ImportError` too.',
    "NonFiniteError": "Inf or NaN was met where it cannot be skipped, or where an error was asked for; `.records` "
    "tells of the skips behind it. It is a `FloatingPointError` too. See "
    "[after a skip](../guard.md#after-a-skip) and [tracing](../trace.md), which finds the operation.",
    "OutputError": "A file or folder cannot be written, or is there already: runs are never overwritten by accident, "
    "`--overwrite` or another `--out`. It is an `OSError` too.",
    "ShapeError": "Shapes of tensors do not fit each other. Nothing is broadcast. It is a `ValueError` too.",
}
# Folder or file of mlpkit: the page that says how the thing is meant to be used.
GUIDES = {
    "bench": "bench.md",
    "functional": "nn.md",
    "guard": "guard.md",
    "init": "nn.md",
    "interop": "interop.md",
    "nn": "nn.md",
    "ops": "nn.md",
    "population": "population.md",
    "report": "cli.md",
    "trace": "trace.md",
    "tune": "tune.md",
    "_ext.py": "cuda.md",
    "reference.py": "masks.md",
}
# Messages of ``Member`` go through one function: (field, value, what it must be).
REFUSE = "refuse"


@dataclass(frozen=True)
class Raised:
    """One place that raises: the class, the message with its gaps, and where."""

    kind: str
    message: str
    path: Path
    function: str

    @property
    def slug(self) -> str:
        """The anchor: what is constant in the message."""
        words = re.sub(r"[^a-z0-9]+", "-", self.message.replace("…", " ").lower()).strip("-")
        return words[:80].rstrip("-") or "message"


def _text(node: ast.expr, known: dict[str, str]) -> str:
    """A message as far as it is known beforehand, with the module's constants; … where a value comes in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, known) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, known) + _text(node.right, known)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return known.get(node.value.id, "…")
    return "…"


def _message(call: ast.Call, kind: str, known: dict[str, str]) -> str:
    if kind == REFUSE:
        return f"Member: {_text(call.args[0], known)} is …; it must be {_text(call.args[2], known)}"
    return re.sub(r"(…\s*)+…", "…", _text(call.args[0], known)).strip()


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts and numbers that a module names."""
    return {
        target.id: str(node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _of_file(path: Path) -> Iterator[Raised]:
    tree = ast.parse(path.read_text())
    known = _constants(tree)

    def visit(node: ast.AST, function: str) -> Iterator[Raised]:
        for child in ast.iter_child_nodes(node):
            inner = f"{function}.{child.name}".lstrip(".") if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else ""
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.args:
                kind = child.func.id
                if kind in CLASSES or (kind == REFUSE and len(child.args) == 3):
                    name = "ArgumentError" if kind == REFUSE else kind
                    yield Raised(name, _message(child, kind, known), path, function)
            yield from visit(child, inner or function)

    yield from visit(tree, "")


def raised() -> dict[str, list[Raised]]:
    """Every message of mlpkit by class; one that only passes another on (a bare …) is left out."""
    found: dict[str, dict[str, Raised]] = defaultdict(dict)
    for path in sorted(PACKAGE.rglob("*.py")):
        for one in _of_file(path):
            if one.message.strip("…. :"):
                found[one.kind].setdefault(one.message, one)
    return {kind: list(found[kind].values()) for kind in CLASSES}


def _guide(path: Path) -> str:
    return GUIDES.get(path.relative_to(PACKAGE).parts[0], "faq.md")


def page_of(kind: str, messages: list[Raised]) -> str:
    """The page of a class: what it means, then every message, by the part of mlpkit that raises it."""
    lines = [f"---\nhide: [toc]\n---\n\n# {kind}\n\n{CLASSES[kind]}\n"]
    lines.append("Where a value comes in there is a …\n")
    parts: dict[str, list[Raised]] = defaultdict(list)
    for one in messages:
        parts[one.path.relative_to(PACKAGE).parts[0].removesuffix(".py").lstrip("_")].append(one)
    taken: set[str] = set()
    for part, group in sorted(parts.items()):
        lines.append(f"\n## {part}\n\n[How it is meant to be used](../{_guide(group[0].path)})\n")
        for one in group:
            slug, number = one.slug, 2
            while slug in taken:
                slug, number = f"{one.slug}-{number}", number + 1
            taken.add(slug)
            source = one.path.relative_to(ROOT)
            message = one.message.replace("`", "'").replace("\n", " ")
            where = f"`{one.function}` in `{source}`" if one.function else f"`{source}`"
            lines.append(f"`{message}`{{ #{slug} }} [¶](#{slug}){{ .headerlink }}\n:   {where}\n")
    return "\n".join(lines)


def index(found: dict[str, list[Raised]]) -> str:
    """The first page: the classes, and what they are beside ``MlpkitError``."""
    lines = [
        "# Errors\n",
        "Each error inherits from `mlpkit.errors.MlpkitError` and from the built-in class that one would expect. The "
        "command line makes one sentence of it, and exit code 2. A page for each class lists every message that mlpkit "
        "raises, from its sources; [those that are met most](../faq.md), with what is behind them.\n",
        "| class | messages | |\n|---|---:|---|",
    ]
    for kind, messages in found.items():
        first = CLASSES[kind].split(". ")[0].split(": ")[0].split("; ")[0].rstrip(".")
        lines.append(f"| [{kind}]({kind}.md) | {len(messages)} | {first} |")
    lines.append(
        "\nErrors from C++ kernels are torch's: `ValueError`, `RuntimeError`, `NotImplementedError`; their messages "
        "begin with the name of the op."
    )
    return "\n".join(lines) + "\n"


def on_config(config: Any) -> Any:
    """Put the pages into the navigation."""
    pages = ["errors/index.md", *({kind: f"errors/{kind}.md"} for kind in CLASSES)]
    for entry in config["nav"]:
        for part in entry.get("Reference", []) if isinstance(entry.get("Reference"), list) else []:
            if "Errors" in part:
                part["Errors"] = pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make the pages."""
    from mkdocs.structure.files import File

    found = raised()
    pages = {"index": index(found), **{kind: page_of(kind, messages) for kind, messages in found.items()}}
    for name, text in pages.items():
        files.append(File.generated(config, f"errors/{name}.md", content=text))
    return files
