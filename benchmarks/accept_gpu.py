"""What ``make gpu`` runs on a machine with a GPU: build, tests marked ``cuda``, GPU benchmarks, one results file.

Installs nothing and uses the python it runs under; says what it skips. Under 10 minutes on 16 cores. Where there is no
package registry, CUTLASS (for wide layers) is found on PYTHONPATH, where its wheel was unpacked, or by CUTLASS_PATH.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"


def run(label: str, command: list[str], **environment: str) -> int:
    print(f"\n=== {label}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=BUILD, env={**os.environ, **environment}, check=False).returncode
    print(f"=== {label}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
    return code


def build(cmake: str) -> int:
    major, minor = _capability()
    suffix = "a" if major == 9 else ""
    environment = {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}{suffix}")}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, "-DCMAKE_BUILD_TYPE=Release", "-DMLPKIT_CUDA=ON"]
    code = run("configure", [*configure, f"-DPython_EXECUTABLE={sys.executable}"], **environment)
    if code == 0:
        code = run("compile", [cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)], **environment)
    if code == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.copytree(ROOT / "mlpkit", SITE / "mlpkit", ignore=shutil.ignore_patterns("__pycache__"))
        code = run("install", [cmake, "--install", str(BUILD), "--prefix", str(SITE)])
    return code


def test(inside: dict[str, str]) -> int:
    """All tests marked ``cuda`` by the proven kernels, the layers' again by all; the small cases under memcheck."""
    runner = [sys.executable, str(ROOT / ".ci" / "run_installed.py"), "-m", "cuda", "-c", str(ROOT / "pyproject.toml")]
    code = run("tests, proven kernels", [*runner, str(ROOT / "tests")], **inside)
    layers = sorted(map(str, (ROOT / "tests").glob("test_linear_act_dropout*.py")))
    layers += [str(ROOT / "tests" / name) for name in ("test_guarded_update_cuda.py", "test_census_cuda.py")]
    everything = {**inside, "MLPKIT_CUDA_KERNELS": "all"}
    code = run("tests, all kernels", [*runner, *layers], **everything) or code
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("=== memcheck skipped: compute-sanitizer is not on PATH", flush=True)
        return code
    small = [str(ROOT / "tests" / "test_linear_act_dropout_thin.py"), "-k", "small"]
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *runner, *small]
        code = run(f"compute-sanitizer {tool}", command, **everything) or code
    return code


def _capability() -> tuple[int, int]:
    try:
        import torch
    except ImportError:
        sys.exit(f"make gpu: {sys.executable} has no torch; name one that has with PYTHON=...")
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no CUDA device here; run it on a machine with one")
    return torch.cuda.get_device_capability()


def _results_path(folder: Path) -> Path:
    import torch

    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    return folder / f"{device}-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file"
    )
    args = parser.parse_args()
    cmake = shutil.which("cmake")
    if cmake is None:
        sys.exit("make gpu: cmake is not on PATH")
    BUILD.mkdir(parents=True, exist_ok=True)
    code = build(cmake)
    if code:
        return code
    paths = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    inside = {"PYTHONPATH": paths, "MLPKIT_REQUIRE_CUDA": "1"}
    run("facts", [sys.executable, "-m", "mlpkit"], **inside)
    if importlib.util.find_spec("pytest") is None:
        print("=== tests skipped: this python has no pytest", flush=True)
    else:
        code = test(inside)
    path = _results_path(args.results.resolve())
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.py", "gpu_step.py", "gpu_wide.py", "gpu_split.py", "gpu_update.py", "gpu_population.py"):
        script = ROOT / "benchmarks" / name
        code = run(f"benchmarks, {name}", [sys.executable, str(script), "--out", str(path)], **inside) or code
    return code


if __name__ == "__main__":
    sys.exit(main())
