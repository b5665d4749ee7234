"""The shared report page: complete, offline, escaped, readable without a mouse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlpkit.errors import ArgumentError, MissingExtraError
from mlpkit.report import Code, Fact, Figure, Html, Notes, Section, Table, Text, render_page, write_whole

FIGURE = Figure(
    "Loss",
    {
        "data": [
            {"type": "scatter", "x": [1, 2], "y": [3, 4], "name": "</script><b>", "line": {"color": "var(--accent)"}}
        ]
    },
    alt="Loss falls from 4 to 3.",
    table=Table(["epoch", "loss"], [[1, 4.0], [2, 3.0]]),
)


class Page(HTMLParser):
    """Tags with attributes, and text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not (self.open and self.open[-1] == "style"):
            self.text += data

    def find(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(**changes):
    arguments = {"kind": "mlpkit trace", "title": "train.py", "lead": "It failed.", **changes}
    return render_page(**arguments)


def test_page_shows_title_lead_verdict_facts_and_sections():
    page = Page(
        page_of(
            verdict=["First.", "Second."],
            tone="bad",
            facts=[Fact("Steps", "137", "of 200")],
            sections=[Section("Chain", [Text("Some words.")], "Why."), Section("More", [Notes(["one", "two"])])],
            footer="The end.",
        )
    )
    for words in ("train.py", "It failed.", "First.", "Second.", "137", "of 200", "Chain", "Why.", "two", "The end."):
        assert words in page.text
    assert {"class": "verdict bad", "aria-label": "Verdict"} in page.find("section")
    assert [item["href"] for item in page.find("a")][1:] == ["#chain", "#more"]


def test_text_from_outside_is_escaped_and_only_html_blocks_are_not():
    blocks = [Text("<i>a</i>"), Code("if a < b:"), Table(["<u>"], [["<s>"]]), Html("<em>mine</em>")]
    page = Page(page_of(title="<script>x</script>", sections=[Section("A & B", blocks)]))
    names = [name for name, _ in page.tags]
    assert not {"i", "u", "s"} & set(names)
    assert names.count("script") == 1  # The page's own.
    assert names.count("em") == 1
    assert "if a < b:" in page.text


def test_nothing_in_the_page_points_to_the_network():
    text = page_of(sections=[Section("Figures", [FIGURE])], data={"a": 1})
    page = Page(text)
    for name, attributes in page.tags:
        for key in ("src", "href", "action", "data", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), (name, key, value)
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]


def test_plotly_goes_in_once_and_only_where_there_is_a_figure():
    without = page_of(sections=[Section("Words", [Text("none")])])
    two = page_of(sections=[Section("Figures", [FIGURE, FIGURE]), Section("More", [FIGURE])])
    assert len(without) < 100_000
    assert 4_000_000 < len(two) < 7_000_000
    assert sum("plotly.js v" in script for script in Page(two).scripts) == 1


def test_figure_has_a_text_alternative_a_table_and_the_keyboard():
    page = Page(page_of(sections=[Section("Figures", [FIGURE])]))
    (canvas,) = [item for item in page.find("div") if item.get("role") == "img"]
    assert canvas["aria-label"] == FIGURE.alt
    assert canvas["tabindex"] == "0"
    assert "Numbers behind this figure" in page.text
    specs = [json.loads(script) for script in page.scripts if script.lstrip().startswith("{")]
    assert specs == [FIGURE.plot]  # A closing tag inside the data ends neither the element nor the page.


def test_numbers_are_aligned_right_and_names_left():
    page = page_of(
        sections=[Section("T", [Table(["size", "score", "note"], [["16", 0.98765, "a"], ["32", 1.0, None]])])]
    )
    cells = [line.strip() for line in page.splitlines() if line.strip().startswith("<td")]
    assert cells[:3] == ["<td>16</td>", '<td class="number">0.9877</td>', "<td>a</td>"]
    assert cells[5] == "<td>\N{EN DASH}</td>"


def test_data_can_be_downloaded_as_json():
    import base64

    page = Page(page_of(data={"score": 0.5, "text": "</a>"}))
    (link,) = [item for item in page.find("a") if "download" in item]
    assert json.loads(base64.b64decode(link["href"].split("base64,")[1])) == {"score": 0.5, "text": "</a>"}


def test_not_a_number_in_the_data_is_refused_rather_than_written_as_broken_json():
    with pytest.raises(ValueError, match="JSON"):
        page_of(data={"score": float("nan")})


def test_unknown_tone_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="good, notice, bad, neutral"):
        page_of(tone="great")


def test_write_whole_leaves_no_other_file(tmp_path):
    written = write_whole(tmp_path / "sub" / "report.html", "<p>one</p>")
    write_whole(written, "<p>two</p>")
    assert written.read_text() == "<p>two</p>"
    assert [item.name for item in written.parent.iterdir()] == ["report.html"]


def test_a_file_has_the_mode_that_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_whole(tmp_path / "page.html", "text")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_failed_write_leaves_the_old_page(tmp_path):
    path = write_whole(tmp_path / "report.html", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_extra_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mlpkit\[report\]"'):
        page_of()


def test_import_loads_neither_plotly_nor_jinja2():
    code = "import sys, mlpkit.report; assert not {'plotly', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
