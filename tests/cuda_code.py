"""Reads machine code of CUDA kernels, from the extension or from object files: registers, memory, instructions."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest


class Kernel(NamedTuple):
    registers: int
    stack: int  # bytes, like local
    local: int
    sass: str

    @property
    def uses_local_memory(self) -> bool:
        return bool(self.stack or self.local or re.search(r"\b(LDL|STL)\b", self.sass))


def find_tool(name: str) -> str | None:
    """A CUDA tool on PATH or in the package that PyPI has of it."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return shutil.which(name) or next((str(path) for path in sorted(packages.glob(f"*/bin/{name}"))), None)


def dump(path: Path, *options: str) -> str:
    """What cuobjdump prints of a file; skips the test where there is no cuobjdump."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on PATH and nvidia-cuda-cuobjdump is not installed")
    return subprocess.run([cuobjdump, *options, str(path)], capture_output=True, text=True, check=True).stdout


@functools.cache
def read_kernels(path: Path, device: str) -> dict[str, Kernel]:
    """Every kernel of a file for one device such as "sm_80", by mangled name."""
    usage = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump(path, "-arch", device, "-res-usage")
    )
    parts = (part.partition("\n") for part in dump(path, "-arch", device, "--dump-sass").split("Function : ")[1:])
    code = {name.strip(): body for name, _, body in parts}
    assert code.keys() == {name for name, *_ in usage}
    return {name: Kernel(*map(int, numbers), sass=code[name]) for name, *numbers in usage}
