"""Renders examples/ into pages: mkdocs calls this as a hook, the tests of the examples fill its cache.

An example runs once for each version of its text: text and pictures are kept in build/gallery beside a digest.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
CACHE = ROOT / "build" / "gallery"
EXAMPLES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
# First number of each topic.
TOPICS = {
    1: "Activations",
    5: "From scratch",
    11: "Capacity",
    17: "Regularisation",
    26: "Starts and norms",
    33: "Training",
    40: "When numbers break",
    43: "Cost",
}
# Colours of examples/common.py and what they become on a dark page.
DARK = {"#24292f": "#e3e6ea", "#ffffff": "#1e2129", "#d9dee3": "#3a404a"}


def topic_of(path: Path) -> str:
    """The heading that an example stands under."""
    return TOPICS[max(first for first in TOPICS if first <= int(path.name[:2]))]


def words_of(path: Path) -> tuple[str, str]:
    """The question in the first line of an example, and the rest of its docstring."""
    question, _, rest = (ast.get_docstring(ast.parse(path.read_text())) or path.stem).partition("\n")
    return question.strip(), rest.strip()


def digest(path: Path) -> str:
    """What a rendering was made from."""
    return hashlib.sha256(path.read_bytes() + (FOLDER / "common.py").read_bytes()).hexdigest()


def render(path: Path) -> Any:
    """Run an example; keep its text and its pictures, light and dark; return what its ``main`` returns."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    CACHE.mkdir(parents=True, exist_ok=True)
    picture = CACHE / f"{path.stem}.svg"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        spec.loader.exec_module(module)
        found = module.main(picture)
    dark = picture.read_text()
    for light, other in DARK.items():
        dark = dark.replace(light, other)
    (CACHE / f"{path.stem}.dark.svg").write_text(dark)
    kept = {"digest": digest(path), "printed": printed.getvalue()}
    (CACHE / f"{path.stem}.json").write_text(json.dumps(kept))
    return found


def printed_by(path: Path) -> str:
    """What an example printed, from the cache or by running it."""
    kept = CACHE / f"{path.stem}.json"
    if not kept.exists() or json.loads(kept.read_text())["digest"] != digest(path):
        import matplotlib
        import torch

        matplotlib.use("agg")
        torch.set_num_threads(1)
        print(f"gallery: {path.name}", file=sys.stderr)
        render(path)
    return str(json.loads(kept.read_text())["printed"])


def both(stem: str, alt: str) -> str:
    """The picture for light pages and the one for dark pages."""
    return f"![{alt}]({stem}.svg#only-light)\n![{alt}]({stem}.dark.svg#only-dark)\n"


def page_of(path: Path) -> str:
    """The page of one example: words, picture, printed lines, code."""
    question, rest = words_of(path)
    return (
        f"---\nhide: [toc]\n---\n\n# {question}\n\n{rest}\n\n{both(path.stem, question)}\n"
        f"It prints:\n\n```output\n{printed_by(path)}```\n\n"
        f"## The code\n\n`examples/{path.name}`; what it imports from `common` is [here](common.md).\n\n"
        f"```python\n{path.read_text()}```\n"
    )


def index() -> str:
    """The first page of the gallery: all questions by topic."""
    lines = [
        "# Gallery\n",
        "Questions that people ask about multi-layer perceptrons, each answered by a script of at most 80 lines that "
        "runs on one CPU core without a network. The tests run every one of them and check the claim that it prints.\n",
        "```sh\npython examples/01_why_activations.py --out picture.svg\n```\n",
    ]
    for topic in TOPICS.values():
        lines.append(f"\n## {topic}\n")
        lines += [f"- [{words_of(path)[0]}]({path.stem}.md)" for path in EXAMPLES if topic_of(path) == topic]
    return "\n".join(lines) + "\n"


def on_config(config: Any) -> Any:
    """Put the pages of the gallery into the navigation, by topic."""
    topics = [
        {topic: [f"gallery/{path.stem}.md" for path in EXAMPLES if topic_of(path) == topic]}
        for topic in TOPICS.values()
    ]
    for entry in config["nav"]:
        if "Gallery" in entry:
            entry["Gallery"] = ["gallery/index.md", *topics, {"Shared code": "gallery/common.md"}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make the pages and pictures."""
    from mkdocs.structure.files import File

    common = (FOLDER / "common.py").read_text()
    pages = {"index": index(), "common": f"# What the examples share\n\n```python\n{common}```\n"}
    pages |= {path.stem: page_of(path) for path in EXAMPLES}
    for name, text in pages.items():
        files.append(File.generated(config, f"gallery/{name}.md", content=text))
    for path in EXAMPLES:
        for name in (f"{path.stem}.svg", f"{path.stem}.dark.svg"):
            files.append(File.generated(config, f"gallery/{name}", abs_src_path=str(CACHE / name)))
    return files
