"""How many instructions the AVX2 kernels take for work of a fixed size: a guard against regressions that no clock has.

``make instructions`` (this file with --update) counts anew and writes tests/native/instructions.json.
"""

import json
import platform
import re
import shutil
import subprocess
import sys

import pytest
from native_build import SOURCES, build, compiler, run

KERNELS = ("gemm", "epilogue", "mask_tile", "adam")
COMMITTED = SOURCES / "instructions.json"
UPDATE = "make instructions"
# Counts repeat to a few instructions with one compiler. Another may choose otherwise: only gross growth fails there.
GROWTH, OTHER_COMPILERS_GROWTH = 1.05, 1.5


def compiler_version():
    """The first line of --version without the program's name: c++ and g++ are one compiler."""
    return run([compiler(), "--version"]).splitlines()[0].partition(" ")[2]


def why_not():
    """Why nothing can be counted here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"AVX2 kernels are counted, this is {platform.machine()}"
    if shutil.which("valgrind") is None:
        return "no valgrind on this machine, which counts the instructions"
    return None


def instructions(name, program, folder):
    """Instructions inside ``count_<name>`` of the program, and all that it calls."""
    output = folder / f"{name}.callgrind"
    options = ["--tool=callgrind", f"--toggle-collect=count_{name}", f"--callgrind-out-file={output}"]
    result = subprocess.run(["valgrind", *options, str(program), name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(re.search(r"^(?:summary|totals): (\d+)", output.read_text(), re.MULTILINE).group(1))


def refusal(name, counted, committed, growth):
    """What is wrong with a count, or None."""
    if counted <= committed * growth:
        return None
    return (
        f"{name} takes {counted} instructions, {counted / committed - 1:+.1%} on the committed {committed}; "
        f"{growth - 1:.0%} is allowed. If that is meant: {UPDATE}"
    )


@pytest.fixture(scope="module")
def native_counts():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return build("native_counts")


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_takes_no_more_instructions_than_committed(name, native_counts, tmp_path):
    committed = json.loads(COMMITTED.read_text())
    growth = GROWTH if committed["compiler"] == compiler_version() else OTHER_COMPILERS_GROWTH
    counted = instructions(name, native_counts, tmp_path)
    assert counted > 0
    problem = refusal(name, counted, committed["instructions"][name], growth)
    assert problem is None, problem


def test_growth_is_refused_and_says_how_to_accept_it():
    assert refusal("adam", 1049, 1000, GROWTH) is None
    assert "+5.1%" in refusal("adam", 1051, 1000, GROWTH)
    assert UPDATE in refusal("adam", 1051, 1000, GROWTH)


def update(folder):
    """Writes what is counted here and with which compiler."""
    program = build("native_counts")
    counts = {name: instructions(name, program, folder) for name in KERNELS}
    COMMITTED.write_text(json.dumps({"compiler": compiler_version(), "instructions": counts}, indent=2) + "\n")
    print(COMMITTED.read_text(), end="")


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    if sys.argv[1:] != ["--update"] or why_not():
        sys.exit(why_not() or f"usage: {UPDATE}")
    with tempfile.TemporaryDirectory() as name:
        update(Path(name))
