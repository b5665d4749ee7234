"""What is shipped: one version, an sdist with all that a build needs, types that a strict user can rely on."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import mlpkit

ROOT = Path(__file__).parents[1]
USER = """
import torch
from mlpkit import census, functional
from mlpkit.guard import GradScaler, StepResult, TrainStep
from mlpkit.interop.onnx import stock
from mlpkit.nn import MLP, MCPrediction, predict_mc
from mlpkit.trace import Diagnosis, Tracer

model = MLP(4, (8,), 2, activation="gelu", dropout=0.1)
step = TrainStep(model, "cross_entropy", torch.optim.Adam(model.parameters()), clip_norm=1.0)
with Tracer(model) as tracer:
    result: StepResult = step(torch.randn(3, 4), torch.randint(2, (3,)))
loss: float = result.loss
diagnosis: Diagnosis = tracer.diagnosis
guess: MCPrediction = predict_mc(model, torch.randn(3, 4), samples=5)
plain: torch.nn.Module = stock(model)
y: torch.Tensor = functional.linear_act_dropout(torch.randn(3, 4), torch.randn(5, 4))
print(plain, census(y), GradScaler("cpu"), loss, diagnosis.sentence, guess.mean)
"""


def test_the_version_is_written_in_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version = ", project, re.MULTILINE)
    assert f"## {mlpkit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_sdist_holds_what_a_build_needs_and_nothing_built(tmp_path):
    pytest.importorskip("scikit_build_core")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert mlpkit.__version__ in archive.name
    assert archive.stat().st_size < 5_000_000
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
        info = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    assert f"Version: {mlpkit.__version__}" in info
    needed = [path for folder in ("csrc", "cmake", "mlpkit") for path in (ROOT / folder).rglob("*") if path.is_file()]
    ignored = {".so", ".pyc"}
    expected = {str(path.relative_to(ROOT)) for path in needed if path.suffix not in ignored}
    assert expected - {"mlpkit/_build_config.py"} <= names
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "mlpkit/py.typed"} <= names
    unwanted = [
        name for name in names if name.endswith((".so", ".pyc", ".o")) or name.startswith(("build/", "out/", ".ci"))
    ]
    assert not unwanted


@pytest.mark.slow
def test_a_strict_users_file_passes_mypy(tmp_path):
    pytest.importorskip("mypy")
    user = tmp_path / "user.py"
    user.write_text(USER)
    run = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", "--follow-imports=silent"]
    result = subprocess.run([*run, str(user)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    exec(compile(USER, "user.py", "exec"), {})


def test_completion_for_the_shell_is_there():
    code = "from mlpkit.cli import cli; cli(prog_name='mlpkit')"
    for shell, word in (("bash", "complete"), ("zsh", "compdef"), ("fish", "complete")):
        environment = {**os.environ, "_MLPKIT_COMPLETE": f"{shell}_source"}
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
        if shell == "bash" and "version" in result.stderr.lower():
            continue  # click asks the installed bash for its version
        assert word in result.stdout, result.stderr
