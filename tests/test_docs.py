"""The pages: every link leads somewhere, snippets of the new pages run, quoted errors are those that are raised."""

import re
from pathlib import Path

import pytest
import torch

from mlpkit.functional import linear_act_dropout
from mlpkit.nn import MLP, predict_mc

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
EXAMPLES = {path.stem for path in (ROOT / "examples").glob("[0-9]*.py")} | {"index", "common"}


def prose(path):
    """A page without its code, where brackets are no links."""
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)


def anchors(path):
    """Ids of the headings as the site makes them: lower case, words joined by hyphens."""
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower())
        for title in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    }


def broken(path, text):
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith(("http:", "https:")):
            continue
        if file.startswith("gallery/"):
            if Path(file).stem not in EXAMPLES:
                yield target
            continue
        page = (path.parent / file).resolve() if file else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            yield target


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    assert not list(broken(path, prose(path)))


def test_a_broken_link_would_be_seen():
    text = "[a](guard.md#after-a-skip) [b](guard.md#no-such-part) [c](none.md) [d](gallery/99_no.md)"
    assert list(broken(ROOT / "docs" / "index.md", text)) == ["guard.md#no-such-part", "none.md", "gallery/99_no.md"]


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = set(re.findall(r"[\w-]+\.md", nav))
    assert named == {path.name for path in PAGES}


@pytest.mark.parametrize(
    "name", ["index.md", "from-sklearn.md", "from-tiny-cuda-nn.md", "from-hf-debug.md", "interop.md"]
)
def test_the_snippets_run_in_order(name, capsys):
    pytest.importorskip("sklearn")
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL):
        exec(compile(snippet, f"docs/{name}", "exec"), names)
    if name == "index.md":
        printed = capsys.readouterr().out
        assert float(re.search(r"not seen: ([\d.]+)", printed).group(1)) > 0.85
        assert "True inputs" in printed
        assert "exp in float32 gave Inf; exact result 2.69e43 > 3.4e38 (overflow)." in printed


QUOTED = {
    "x has 20 features, weight (64, 32) wants 32": lambda: linear_act_dropout(torch.ones(1, 20), torch.ones(64, 32)),
    "predict_mc: samples is 1": lambda: predict_mc(MLP(2, (2,), 1, dropout=0.5), torch.ones(3, 2), samples=1),
    "double backward is not implemented": lambda: torch.autograd.grad(
        torch.autograd.grad(MLP(2, (2,), 1)(x := torch.ones(1, 2, requires_grad=True)).sum(), x, create_graph=True)[0]
        .square()
        .sum(),
        x,
    ),
    "Expected more than 1 value per channel when training": lambda: MLP(2, (2,), 1, norm="batch")(torch.ones(1, 2)),
}


@pytest.mark.parametrize("message", QUOTED)
def test_the_faq_quotes_what_is_raised(message):
    assert message in (ROOT / "docs" / "faq.md").read_text()
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        QUOTED[message]()
