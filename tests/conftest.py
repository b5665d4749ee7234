"""What every test shares: the CUDA marker, pinned threads and seeds, and the CPU variants of this machine."""

import os
import warnings

import pytest
import torch


def cuda_is_missing():
    """Why tests marked ``cuda`` cannot run here, or None."""
    with warnings.catch_warnings():
        # Without a driver, a CUDA build of torch warns here and answers False.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
    from mlpkit import _build_config

    return None if _build_config.CUDA else "mlpkit was built without CUDA"


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is None:
        return
    reason = cuda_is_missing()
    if reason is not None:
        required = os.environ.get("MLPKIT_REQUIRE_CUDA") == "1"
        (pytest.fail if required else pytest.skip)(reason + (", and MLPKIT_REQUIRE_CUDA=1" if required else ""))


def pytest_generate_tests(metafunc):
    # Asked for only where a test wants it: the tests of the reference run without a native build.
    if "cpu_capability" in metafunc.fixturenames:
        from mlpkit._ext import _C

        metafunc.parametrize("cpu_capability", _C.cpu_capabilities(), indirect=True)


@pytest.fixture
def cpu_capability(request):
    """Runs the test once for each instruction set that this machine has; the value is its name."""
    from mlpkit._ext import _C

    before = _C.cpu_capability()
    _C.force_cpu_capability(request.param)
    yield request.param
    _C.force_cpu_capability(before)


@pytest.fixture
def all_cuda_kernels():
    """Takes the CUDA kernels that no device has proven, too."""
    from mlpkit._ext import _C

    before = _C.cuda_kernels()
    _C.force_cuda_kernels("all")
    yield
    _C.force_cuda_kernels(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Runs the test on the CPU and, where there is one, on a CUDA device."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _pinned():
    """One thread and one seed at the start of each test: no result depends on the tests that ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
