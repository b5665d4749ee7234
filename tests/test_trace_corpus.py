"""The corpus of planted faults: what the oracle sees, what the tracer says, and no alarm where nothing is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import CASES, HEALTHY, VARIANTS, execute
from corpus.oracle import Oracle
from corpus.scorecard import judge, truth_of

from mlpkit.trace import Tracer

HERE = Path(__file__).parent
EVERY = [
    pytest.param(name, variant, id=f"{name}-{variant.index}", marks=[pytest.mark.exhaustive] if variant.index else [])
    for name in CASES
    for variant in VARIANTS
]
QUIET = [
    pytest.param(name, variant, id=f"{name}-{variant.index}", marks=[pytest.mark.exhaustive] if variant.index else [])
    for name in HEALTHY
    for variant in VARIANTS
]
pytestmark = pytest.mark.filterwarnings("ignore:std\\(\\)", "ignore:.*degrees of freedom")


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_the_fault_does_what_the_corpus_says(name, variant):
    case = CASES[name]
    with Oracle() as oracle:
        outcome = execute(case, variant)
    assert len(outcome) > 0
    if case.silent:
        assert all(bool((tensor == 0).all()) for tensor in outcome)
    else:
        assert not all(bool(torch.isfinite(tensor).all()) for tensor in outcome)
    if not case.silent and case.phase != "source" and case.born:
        steps = [birth.step for birth in oracle.births if birth.op == case.born]
        # A hand-written update is no step to the oracle.
        assert steps
        assert case.step is None or case.step in steps or case.phase == "optimizer"


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_without_the_fault_nothing_is_wrong(name, variant):
    case = CASES[name]
    with Tracer() as tracer:
        outcome = execute(case, variant, planted=False)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in outcome)
    if case.silent:
        assert any(bool((tensor != 0).any()) for tensor in outcome)
    assert tracer.diagnosis.verdict == "healthy", tracer.diagnosis.sentence


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_the_root_is_found(name, variant):
    case = CASES[name]
    with Tracer() as tracer:
        execute(case, variant)
    found = tracer.diagnosis
    verdict = judge(case, variant, found.to_dict(), truth_of(case, variant))
    assert all(verdict.values()), (verdict, found.sentence)
    assert found.fix
    assert found.chain


@pytest.mark.parametrize(("name", "variant"), QUIET)
def test_no_false_alarm(name, variant):
    torch.manual_seed(variant.seed)
    with Tracer() as tracer:
        HEALTHY[name](variant)
    assert tracer.diagnosis.verdict == "healthy", tracer.diagnosis.sentence
    assert not [found for found in tracer.diagnoses if found.verdict == "warning"]


def command_line(*arguments, out):
    code = "from mlpkit.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "trace", "--out", str(out), str(HERE / "corpus" / "program.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(CASES))
def test_a_script_gets_the_same_answer(name, tmp_path):
    case, variant = CASES[name], VARIANTS[0]
    with Tracer() as tracer:
        execute(case, variant)
    result = command_line(name, "0", out=tmp_path)
    assert result.returncode == 0, result.stderr
    first = next(line for line in result.stderr.splitlines() if line.startswith("mlpkit: "))
    assert first.split(": ", 2)[2].split("(")[0] == tracer.diagnosis.sentence.split(": ", 1)[1].split("(")[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(HEALTHY))
def test_a_healthy_script_is_called_healthy(name, tmp_path):
    result = command_line(name, "1", out=tmp_path)
    assert "mlpkit: No failure" in result.stderr


def test_a_sample_of_scripts(tmp_path):
    result = command_line("log_of_a_softmax", "1", out=tmp_path)
    assert "_softmax in float32 gave 0" in result.stderr
    result = command_line("causal_attention", "2", out=tmp_path)
    assert "mlpkit: No failure" in result.stderr
