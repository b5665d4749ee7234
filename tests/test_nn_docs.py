"""docs/nn.md: its snippets run in order, and its fixed outputs are what they print."""

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[1] / "docs" / "nn.md").read_text()


def test_the_snippets_run_and_print_what_the_page_shows(capsys):
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        torch.manual_seed(0)
        exec(compile(snippet, "docs/nn.md", "exec"), names)
    printed = capsys.readouterr().out
    blocks = ["\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^    .+\n)+", PAGE, re.M)]
    # Draws differ between machines, reports and predictions do not.
    fixed = [block for block in blocks if block.startswith(("layer  status", "batch of"))]
    assert len(fixed) == 3
    assert all(block in printed for block in fixed)
    assert names["found"].factor == 0.03125
    assert names["guess"].entropy.shape == (32,)
