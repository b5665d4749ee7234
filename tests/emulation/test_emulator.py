"""The emulator itself: each planted mistake is noticed, none where there is none, and products are products."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from emulator import CSRC, DTYPES, HERE, Device, build, find_compiler, pointer, poisoned

ACROSS, IN_WARP, BY_COPIES = range(3)
# In the order of detectors.cpp.
MISTAKES = [
    "none",
    "no_barrier",
    "no_warp_barrier",
    "read_past_shared",
    "read_past_global",
    "write_past_global",
    "read_unwritten",
    "no_wait_for_copy",
    "no_barrier_after_copy",
    "copy_over_what_is_read",
    "copy_left_under_way",
    "barrier_missed",
    "shuffle_missed",
    "lanes_apart",
    "misaligned",
    "raw_write_past_shared",
]
SCHEDULES = range(8)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    return Device(build(compiler, tmp_path_factory.mktemp("emulator"), calls=["detectors.cpp"]))


def run_pass(device, kernel, mistake):
    numbers = torch.randn(256 if kernel == BY_COPIES else 64)
    result = poisoned(numbers.numel(), torch.float32)
    code = MISTAKES.index(mistake)
    device.run("emulate_pass", [numbers], [result], kernel, code, pointer(numbers), pointer(result))
    return numbers, result


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_right_kernels_pass_under_every_schedule(device, schedule):
    device.schedule = 1000 * schedule
    numbers, result = run_pass(device, ACROSS, "none")
    assert torch.equal(result, numbers.flip(0) + 1)
    numbers, result = run_pass(device, IN_WARP, "none")
    assert torch.equal(result, numbers.view(2, 32).flip(1).reshape(64) + 1)
    numbers, result = run_pass(device, BY_COPIES, "none")
    assert torch.equal(result, numbers.view(64, 4).flip(0).reshape(256) + 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kernel", "mistake", "message"),
    [
        (ACROSS, "no_barrier", "no barrier after its write|that nobody wrote"),
        (ACROSS, "read_past_shared", "outside every shared array"),
        (ACROSS, "read_past_global", "read of 4 bytes outside every allocation"),
        (ACROSS, "write_past_global", "write of 4 bytes outside every allocation"),
        (ACROSS, "barrier_missed", "waits at a barrier"),
        (ACROSS, "raw_write_past_shared", "guard zone"),
        (IN_WARP, "no_warp_barrier", "no barrier after its (write|read)|that nobody wrote"),
        (IN_WARP, "read_unwritten", "that nobody wrote"),
        (IN_WARP, "shuffle_missed", "waits at a shuffle"),
        (IN_WARP, "lanes_apart", "lanes of a warp meet at"),
        (BY_COPIES, "no_wait_for_copy", "before its cp.async was waited for"),
        (BY_COPIES, "no_barrier_after_copy", "no barrier after its write|before its cp.async was waited for|nobody"),
        (BY_COPIES, "copy_over_what_is_read", "no barrier after its (read|write)|before its cp.async"),
        (BY_COPIES, "copy_left_under_way", "ends while its cp.async"),
        (BY_COPIES, "misaligned", "not aligned"),
    ],
)
def test_a_mistake_is_noticed_under_every_schedule(device, kernel, mistake, message, schedule):
    device.schedule = 1000 * schedule
    with pytest.raises(AssertionError, match=message):
        run_pass(device, kernel, mistake)


@pytest.mark.parametrize("one_at_a_time", [False, True])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fragments_multiply_as_matrices_do(device, dtype, by_rows, one_at_a_time):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    right = b.contiguous() if by_rows else b.t().contiguous()
    result = c.clone()
    args = (*map(pointer, (a, right, result)), int(by_rows), int(one_at_a_time))
    device.run("emulate_multiply", [a, right], [result], DTYPES.index(dtype), *args)
    assert torch.equal(result, (a.double() @ b.double() + c.double()).float())


def test_tf32_drops_thirteen_bits_multiplies_and_cuts_the_sum_off(device):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    result = c.clone()
    device.run("emulate_multiply", [a, b], [result], DTYPES.index(torch.float32), *map(pointer, (a, b, result)), 0, 0)
    short_a, short_b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b))
    exact = short_a @ short_b + c.double()
    nearest = exact.float()
    away = nearest.double().abs() > exact.abs()
    assert away.any()
    assert torch.equal(result, torch.where(away, torch.nextafter(nearest, torch.zeros(())), nearest))


def test_inf_and_nan_go_through_a_product(device):
    a, b, result = torch.ones(16, 16).half(), torch.ones(16, 8).half(), torch.zeros(16, 8)
    a[3, 5], a[7, 2] = float("inf"), float("nan")
    b[5, 1] = 0
    device.run("emulate_multiply", [a, b], [result], DTYPES.index(torch.float16), *map(pointer, (a, b, result)), 1, 0)
    expected = a.float() @ b.float()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


def test_votes_are_over_the_warp_and_atomics_over_the_grid(device):
    numbers = torch.randint(0, 1000, (32,), dtype=torch.int32)
    found = torch.zeros(5, dtype=torch.int32)
    device.run("emulate_vote", [numbers], [found], ctypes.c_int64(7), pointer(numbers), pointer(found))
    values = numbers.tolist()
    ballot = sum(1 << lane for lane, value in enumerate(values) if value % 2)
    union = 0
    for value in values:
        union |= value
    assert found.tolist() == [ballot - (ballot >> 31 << 32), sum(values), max(values), union, 7]


def test_two_schedules_are_two_orders(device):
    device.schedule = 0
    with pytest.raises(AssertionError) as first:
        run_pass(device, ACROSS, "no_barrier")
    with pytest.raises(AssertionError) as second:
        run_pass(device, ACROSS, "no_barrier")
    device.schedule = 0
    with pytest.raises(AssertionError) as again:
        run_pass(device, ACROSS, "no_barrier")
    assert str(again.value) == str(first.value) != str(second.value).replace("schedule 2", "schedule 1")


def test_numbers_of_16_bits_are_rounded_as_the_toolkit_does(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    program = tmp_path / "rounding"
    command = [nvcc, "-std=c++17", "-O1", "-I", str(CSRC), str(HERE / "rounding.cu"), "-o", str(program)]
    subprocess.run(command, check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=False).stdout == "0\n"
