"""docs/amp.md and docs/guard.md: the diff applies, both loops run, and what the pages show is what is printed."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
AMP = (DOCS / "amp.md").read_text()


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def shown(page):
    return ["\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^    \S.*\n)+", page, re.M)]


def batches(bad):
    generator = torch.Generator().manual_seed(1)
    for index in range(6):
        x, y = torch.randn(32, 20, generator=generator), torch.randint(3, (32,), generator=generator)
        yield (x * 1e6 if index == bad else x), y


def loop(sign, bad=None):
    (diff,) = blocks(AMP, "diff")
    lines = [line for line in diff.splitlines() if line[:1] in (" ", "", sign)]
    names = {"device": "cpu", "batches": list(batches(bad))}
    exec(compile("\n".join(line[1:] for line in lines), "docs/amp.md", "exec"), names)
    return names


def test_the_diff_is_of_five_lines():
    (diff,) = blocks(AMP, "diff")
    assert sum(line[:1] in ("+", "-") for line in diff.splitlines()) == 5


def test_both_loops_run_and_take_the_same_clean_steps(capsys):
    before, after = loop("-"), loop("+")
    assert torch.equal(before["model"][0].weight, after["model"][0].weight)
    assert torch.equal(before["model"][1].running_var, after["model"][1].running_var)
    assert capsys.readouterr().out == "\n"


def test_the_loop_survives_the_batch_of_the_page_and_prints_what_it_shows(capsys):
    before, after = loop("-", bad=3), loop("+", bad=3)
    assert not torch.isfinite(before["model"][1].running_var).all()
    assert torch.isfinite(after["model"][1].running_var).all()
    assert capsys.readouterr().out.strip() == shown(AMP)[0]


@pytest.mark.parametrize("name", ["amp.md", "guard.md"])
def test_the_snippets_run_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"batches": list(batches(None))}
    if name == "amp.md":
        names = {**loop("+"), **names}
    for snippet in blocks((DOCS / name).read_text(), "python"):
        exec(compile(snippet, f"docs/{name}", "exec"), names)


def test_the_guards_page_shows_the_record_of_its_first_snippet():
    page = (DOCS / "guard.md").read_text()
    torch.manual_seed(0)
    names = {}
    exec(compile(blocks(page, "python")[0], "docs/guard.md", "exec"), names)
    assert str(names["result"].record) == shown(page)[0]
