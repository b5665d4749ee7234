"""The GPU benchmarks' optional rivals: what is missing or fails is skipped with a reason and costs nothing else."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_rivals


def fails(error):
    def attempt():
        raise error

    return attempt


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("no module"), "apex: not installed"),
        (RuntimeError("no kernel\nfor this device"), "apex: RuntimeError: no kernel"),
        (AssertionError(), "apex: AssertionError: "),
    ],
)
def test_a_rival_that_fails_is_skipped_with_a_reason(error, reason):
    skipped = []
    assert not gpu_rivals.tried("apex", fails(error), skipped.append)
    assert skipped == [reason]


def test_a_rival_that_works_is_taken():
    assert gpu_rivals.tried("apex", lambda: None, pytest.fail)


@pytest.mark.parametrize("name", [*gpu_rivals.LAYERS, *gpu_rivals.NETWORKS])
def test_what_is_not_installed_raises_import_error(name):
    packages = {"transformer_engine": "transformer_engine", "apex": "apex", "tiny-cuda-nn": "tinycudann"}
    if packages[name] in sys.modules:
        pytest.skip("it is installed here")
    arguments = (8, 8, None) if name in gpu_rivals.LAYERS else ([8, 8, 8],)
    with pytest.raises(ImportError):
        (gpu_rivals.LAYERS | gpu_rivals.NETWORKS)[name](*arguments)
