"""Builds the programs of tests/native, the CPU kernels without torch. Below build/, so that a second run is quick."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "native"
BUILD = ROOT / "build" / "native"
# Tools that pip installed lie beside the interpreter, which need not be on PATH.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


def build(target: str) -> Path:
    """The path of the program, rebuilt where its sources have changed; skips where cmake or ninja is missing."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"no {tool} on this machine")
    cmake = str(shutil.which("cmake", path=PATH))
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side share the folder
        run([cmake, "-S", str(SOURCES), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_CXX_COMPILER={compiler()}"])
        run([cmake, "--build", str(BUILD), "--target", target])
    return BUILD / target


def run(command: list[str]) -> str:
    """What a command prints; a failure is raised with all of it."""
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def check_names() -> list[str]:
    """Every check in tests/native, without the planted faults."""
    texts = [path.read_text() for path in sorted(SOURCES.glob("check_*.cpp"))]
    return [name for text in texts for name in re.findall(r"^NATIVE_CHECK\((\w+),", text, re.MULTILINE)]
