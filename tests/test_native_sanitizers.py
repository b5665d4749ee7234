"""Every CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer, on memory of exactly its size."""

import os
import re
import subprocess

import pytest
from native_build import ROOT, build, check_names, compiler

FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Nothing here leaks by design: kernels do not allocate, and the leak check needs rights that containers may not give.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="module")
def native_checks(tmp_path_factory):
    probe = tmp_path_factory.mktemp("probe")
    (probe / "main.cpp").write_text("int main() { return 0; }\n")
    compiled = subprocess.run(
        [compiler(), *FLAGS, str(probe / "main.cpp"), "-o", str(probe / "main")], capture_output=True, text=True
    )
    if compiled.returncode or subprocess.run([str(probe / "main")], capture_output=True).returncode:
        pytest.skip(f"{compiler()} has no working address and undefined sanitizers: {compiled.stderr[-200:]}")
    program = build("native_checks")

    def run(name):
        return subprocess.run([str(program), name], capture_output=True, text=True, env=os.environ | ENVIRONMENT)

    return run


@pytest.mark.parametrize("name", check_names())
def test_the_kernel_keeps_to_its_memory_and_errs_within_its_bound(name, native_checks):
    result = native_checks(name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"^{name} default: [1-9]\d* comparisons", result.stdout, re.MULTILINE), "nothing was compared"


def test_every_kernel_has_a_check():
    """A kernel is what csrc/cpu dispatches to an instruction set, or declares for one alone."""
    kernels = set()
    for path in (ROOT / "csrc" / "cpu").glob("*.h"):
        text = path.read_text()
        kernels |= set(re.findall(r"^MLPKIT_CPU_KERNEL\((\w+),", text, re.MULTILINE))
        for body in re.findall(r"^namespace mlpkit::isa_\w+ \{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            kernels |= set(re.findall(r"^void (\w+)\(", body, re.MULTILINE))
    assert kernels >= {"gemm_multiply", "gemm_multiply_pairs", "act_dropout_forward", "update"}
    assert kernels <= set(check_names()), "write tests/native/check_<kernel>.cpp"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("overread", "ERROR: AddressSanitizer"),
        ("overflow", "runtime error: signed integer overflow"),
        ("error", "FAILED: 2 + 2"),
    ],
)
def test_a_planted_fault_is_seen(fault, message, native_checks):
    result = native_checks(f"planted_{fault}")
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
