"""The tuning report in a browser: every figure drawn, no complaint on the console, nothing asked of the network."""

from __future__ import annotations

import html
import json
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


def browse(page, folder, *options):
    """(ended process, its DOM as text) of the page in a browser without a screen and without a network."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        "--virtual-time-budget=8000", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended


def complaints(ended):
    # A machine without a graphics card has the browser say so.
    return [
        line for line in re.findall(r".*CONSOLE.*", ended.stderr) if "WebGL" not in line and "GL Driver" not in line
    ]


def test_a_browser_draws_every_figure_in_silence(page, tmp_path):
    ended = browse(page, tmp_path)
    assert not complaints(ended)
    canvases = [item for item in Page(ended.stdout).find("div") if item.get("role") == "img"]
    assert len(canvases) > 10
    drawn = [item for item in canvases if "js-plotly-plot" in (item.get("class") or "")]
    assert len(drawn) == len(canvases)
    assert "<script>alert" not in ended.stdout.split("</head>")[1]


# Runs in the page: colours by day and by night, then a brush drawn on the first axis of the parallel coordinates.
PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const told = {}, root = document.documentElement;
  const colours = () => {
    const plot = [...document.querySelectorAll(".js-plotly-plot")].find((one) => one.querySelector(".xtick text"));
    return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
            getComputedStyle(plot.querySelector(".xtick text")).fill];
  };
  const night = matchMedia("(prefers-color-scheme: dark)").matches;
  told.start = [night, ...colours()];
  document.getElementById("theme").click();
  setTimeout(() => {
    told.other = colours();
    const lines = [...document.querySelectorAll(".js-plotly-plot")].find((one) => one.data[0].type === "parcoords");
    const axis = lines.querySelector(".axis-brush .background"), box = axis.getBoundingClientRect();
    const at = (kind, share, where) => where.dispatchEvent(new MouseEvent(kind, {
      bubbles: true, cancelable: true, view: window, button: 0,
      clientX: box.left + box.width / 2, clientY: box.top + share * box.height}));
    const before = JSON.stringify(lines.data[0].dimensions.map((one) => one.constraintrange || null));
    at("mousemove", 0.3, axis); at("mousedown", 0.3, axis);
    at("mousemove", 0.5, window); at("mousemove", 0.7, window); at("mouseup", 0.7, window);
    setTimeout(() => {
      told.before = before;
      told.brushed = lines.data[0].dimensions.map((one) => one.constraintrange || null);
      told.range = lines.data[0].dimensions[0].range || null;
      const note = document.createElement("output");
      note.id = "told"; note.textContent = JSON.stringify(told);
      document.body.append(note);
    }, 800);
  }, 800);
}, 1500));
</script></body>
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_dark_and_brushing_work_in_a_browser(page, tmp_path, scheme):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    ended = browse(probed, tmp_path, f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
    assert not complaints(ended)
    told = json.loads(html.unescape(re.search(r'<output id="told">(.*?)</output>', ended.stdout).group(1)))
    night, *start = told["start"]
    assert night == (scheme == "dark")
    light, dark = (told["other"], start) if night else (start, told["other"])
    assert brightness(light[0]) > 0.8 > 0.3 > brightness(dark[0])
    for background, text, tick in (light, dark):
        assert abs(brightness(background) - brightness(text)) > 0.5
        assert abs(brightness(background) - brightness(tick)) > 0.25
    assert json.loads(told["before"]) == [None] * len(told["brushed"])
    low, high = told["brushed"][0]
    assert low < high
    assert told["brushed"][1:] == [None] * (len(told["brushed"]) - 1)


def brightness(colour):
    """0 for black to 1 for white."""
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765
