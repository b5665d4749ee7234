"""What a trace leaves behind: diagnosis.json (schema version 1) and the page."""

import io
import json
import math
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from mlpkit.errors import MissingExtraError
from mlpkit.trace import Tracer

KEYS = {
    "schema_version",
    "verdict",
    "sentence",
    "step",
    "phase",
    "op",
    "module",
    "location",
    "node",
    "cause",
    "dtype",
    "chain",
    "evidence",
    "fix",
}
LINK_KEYS = {"step", "phase", "op", "module", "stage", "cause", "detail"}
STAGES = {"explosion", "saturation", "contamination", "invalidation", "persistence"}


class Odd(nn.Module):
    """A name that HTML must not read as markup."""

    def __init__(self):
        super().__init__()
        self.add_module("<b>&fc", nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(getattr(self, "<b>&fc")(x))


@pytest.fixture
def failed():
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Tracer(model) as tracer:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 8), 1.0 if step < 2 else 1e5)).sum().backward()
            optimizer.step()
            if step == 1:
                with torch.no_grad():
                    getattr(model, "<b>&fc").weight.fill_(1e38)
    return tracer


def test_the_dictionary_has_the_keys_of_schema_version_1(failed):
    found = failed.diagnosis.to_dict()
    assert set(found) == KEYS
    assert found["schema_version"] == 1
    assert all(set(link) == LINK_KEYS and link["stage"] in STAGES for link in found["chain"])
    assert all(set(fix) == {"kind", "text", "verified"} and fix["verified"] is None for fix in found["fix"])
    assert {"index", "operands", "exact", "limit", "absmax_history"} <= set(found["evidence"])


def test_the_file_is_strict_json_and_holds_all_diagnoses(failed, tmp_path):
    path = failed.write_json(tmp_path / "deep" / "diagnosis.json")
    text = path.read_text()
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert loaded["op"] == failed.diagnosis.op
    assert [one["op"] for one in loaded["diagnoses"]] == [one.op for one in failed.diagnoses]
    assert loaded["steps"] == 4
    assert [entry.name for entry in path.parent.iterdir()] == ["diagnosis.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_whole(failed, tmp_path, monkeypatch):
    path = failed.write_json(tmp_path / "diagnosis.json")
    before = path.read_text()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        failed.write_json(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["diagnosis.json"]


def test_the_page_shows_sentence_chain_evidence_and_fix_and_escapes_names(failed, tmp_path):
    page = failed.report(tmp_path / "report.html").read_text()
    body = page[page.index("<body") :]
    assert "&lt;b&gt;&amp;fc" in body
    assert "<b>&fc" not in body.split("<script")[0]
    for heading in ("Chain", "Evidence", "What to change", "Magnitudes"):
        assert f">{heading}<" in body
    assert "http://" not in body.split("<script")[0]
    assert "https://" not in body.split("<script")[0]


def test_the_page_shows_exponents_of_operands_and_result(failed, tmp_path):
    page = failed.report(tmp_path / "report.html").read_text()
    assert ">Exponents<" in page
    assert "operand 1" in page
    assert "result" in page


def test_the_log_has_a_line_for_each_step_and_each_diagnosis(failed, tmp_path):
    lines = [json.loads(line) for line in failed.write_jsonl(tmp_path / "trace.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    found = [line for line in lines if line["kind"] == "diagnosis"]
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    assert math.isfinite(steps[0]["loss"])
    assert "<b>&fc" in steps[0]["modules"]
    assert found[0]["op"] == failed.diagnosis.op


def test_tensorboard_events_or_the_pip_line(failed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mlpkit\[tensorboard\]"'):
        failed.write_tensorboard(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    assert list(failed.write_tensorboard(tmp_path).iterdir())


def test_the_terminal_shows_chain_evidence_and_fix_and_reads_no_markup(failed):
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(failed.diagnosis)
    text = console.export_text()
    assert text.startswith(f"failure: {failed.diagnosis.sentence[:60]}")
    assert "<b>&fc" in text
    assert "exact (fp64)" in text
    assert f"try: {failed.diagnosis.fix[0]['text'][:40]}" in text


def test_a_notebook_shows_sentence_chain_evidence_and_fix_with_names_escaped(failed):
    html = failed._repr_html_()
    assert html == failed.diagnosis._repr_html_()
    assert "<b>&fc" not in html
    assert "&lt;b&gt;&amp;fc" in html
    for words in ("failure</b>: ", "<th>stage</th>", "<td>exact (fp64)</td>", failed.diagnosis.fix[0]["text"][:20]):
        assert words in html


def test_a_healthy_page_says_so(tmp_path):
    with Tracer() as tracer:
        nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    page = tracer.report(tmp_path / "report.html").read_text()
    assert "<h1>No NaN or Inf that mattered</h1>" in page
    assert "No failure in 1 step" in page
    assert "ended with" not in page


def test_an_exception_is_told_where_the_numbers_were_fine(tmp_path):
    tracer = Tracer()
    with pytest.raises(RuntimeError), tracer:
        nn.Linear(2, 2)(torch.ones(1, 3))
    assert tracer.diagnosis.sentence.endswith(". The program ended with RuntimeError.")
    assert tracer.to_dict()["raised"] == "RuntimeError"
    assert "The program ended with RuntimeError; its own" in tracer.report(tmp_path / "report.html").read_text()


def test_a_program_without_operations_is_not_praised():
    with Tracer() as tracer:
        pass
    assert tracer.diagnosis.sentence == "Nothing to check: no operation on floating-point tensors was seen."


def test_without_the_extra_the_report_names_the_pip_line(failed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mlpkit\[report\]"'):
        failed.report(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_cannot_hold_are_strings():
    with Tracer() as tracer:
        w = torch.ones(1, requires_grad=True)
        (w * math.inf - w * math.inf).sum().backward()
    found = tracer.diagnosis.to_dict()
    assert (found["op"], found["cause"]) == ("sub", "inf_minus_inf")
    assert found["evidence"]["operands"] == {"self": "Inf", "other": "Inf"}
    assert found["evidence"]["value"] == "NaN"
