"""The pages: every link leads somewhere, snippets of the new pages run, quoted errors are those that are raised."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlpkit.functional import linear_act_dropout
from mlpkit.nn import MLP, predict_mc

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("errors_pages", ROOT / "docs" / "errors.py")
errors = sys.modules["errors_pages"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(errors)
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
        made = {"gallery": EXAMPLES, "errors": {"index", *errors.CLASSES}, "results.md": {"results"}}
        if file.partition("/")[0] in made:
            if Path(file).stem not in made[file.partition("/")[0]]:
                yield target
            continue
        page = (path.parent / file).resolve() if file else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            yield target


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    assert not list(broken(path, prose(path)))


def test_a_broken_link_would_be_seen():
    text = "[a](guard.md#after-a-skip) [b](guard.md#no-such-part) [c](none.md) [d](gallery/99_no.md) [e](errors/no.md)"
    assert list(broken(ROOT / "docs" / "index.md", text)) == [
        "guard.md#no-such-part",
        "none.md",
        "gallery/99_no.md",
        "errors/no.md",
    ]


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = set(re.findall(r"[\w-]+\.md", nav))
    assert named == {path.name for path in PAGES}


@pytest.mark.parametrize(
    "name", ["index.md", "from-sklearn.md", "from-tiny-cuda-nn.md", "from-hf-debug.md", "from-optuna.md", "interop.md"]
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


def test_every_error_that_is_raised_has_its_place():
    import mlpkit.errors

    classes = {name for name, kind in vars(mlpkit.errors).items() if isinstance(kind, type)} - {"MlpkitError"}
    assert set(errors.CLASSES) == {name for name in classes if name.endswith("Error")}
    found = errors.raised()
    assert sum(map(len, found.values())) > 250
    for kind, messages in found.items():
        page = errors.page_of(kind, messages)
        anchors = re.findall(r"\{ #([\w-]+) \}", page)
        assert len(anchors) == len(messages) == len(set(anchors))
        guides = set(re.findall(r"\]\(\.\./([\w-]+\.md)", page))
        assert guides <= {path.name for path in PAGES}


def matches(message, kind):
    """Whether an error's page holds this message, gaps filled in."""
    patterns = (re.escape(one.message).replace("…", ".*") for one in errors.raised()[kind])
    return any(re.fullmatch(pattern, message, re.DOTALL) for pattern in patterns)


@pytest.mark.parametrize("message", [message for message in QUOTED if "wants" in message or "predict_mc" in message])
def test_a_message_is_found_on_the_page_of_its_class(message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        QUOTED[message]()
    assert matches(str(caught.value), type(caught.value).__name__)
    assert not matches("a message that nobody raises", type(caught.value).__name__)


@pytest.mark.slow
def test_two_processes_run_the_page_on_several(tmp_path):
    page = (ROOT / "docs" / "distributed.md").read_text()
    (tmp_path / "train.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == re.search(r"^    (1 skipped; .*)$", page, re.MULTILINE).group(1)
    assert len(list(tmp_path.glob("run.rank*.pt"))) == 2
