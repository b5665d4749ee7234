"""The tuning report in a browser: every figure drawn, no complaint on the console, nothing asked of the network."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from test_report import Page
from tune_fakes import FakeTrainer, table

from mlpkit.tune import trainer, tune

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def page(monkeypatch, tmp_path):
    """The report of a search with every section, and a column name that is markup."""
    fake = FakeTrainer(lambda spec: 0.8 if spec.hidden else 0.6, noise=0.02, hits=True)
    monkeypatch.setattr(trainer, "train_members", fake)
    frame = table(120)
    frame[EVIL] = frame["a"] - frame["b"]
    run = tune(frame, "label", budget="60 trials", random_state=0, progress=False, space={"epochs": 5})
    return run.report(tmp_path / "report.html")


def test_the_page_holds_the_best_five_with_what_their_curves_say(page):
    text = Page(page.read_text()).text
    assert "Learning curves of the best 5" in text
    assert any(words in text for words in ("levels off", "still falling", "after its best epoch"))
    assert "Uncertainty" in text


def test_a_browser_draws_every_figure_in_silence(page, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        "--virtual-time-budget=8000", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", page.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-2000:]
    # A machine without a graphics card has the browser say so.
    said = [
        line for line in re.findall(r".*CONSOLE.*", ended.stderr) if "WebGL" not in line and "GL Driver" not in line
    ]
    assert not said
    canvases = [item for item in Page(ended.stdout).find("div") if item.get("role") == "img"]
    assert len(canvases) > 10
    drawn = [item for item in canvases if "js-plotly-plot" in (item.get("class") or "")]
    assert len(drawn) == len(canvases)
    assert "<script>alert" not in ended.stdout.split("</head>")[1]
