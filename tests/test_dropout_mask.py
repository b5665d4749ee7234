"""The dropout-mask contract (docs/masks.md): known answers, golden hashes, what it does not depend on."""

import hashlib

import numpy as np
import pytest
import torch
from test_reference import KNOWN_ANSWERS, words
from torch.utils._python_dispatch import TorchDispatchMode

from mlpkit import reference
from mlpkit._ext import _C
from mlpkit.functional import linear_act_dropout
from mlpkit.reference import ACTIVATIONS

# (rows, cols, p, seed, offset, stream): the first half of the SHA-256 of the mask's bits, packed row by row.
# Changing one of these changes every user's masks: it needs a new major version.
GOLDEN = {
    (1, 1, 0.5, 0, 0, 0): "76be8b528d0075f7aae98d6fa57a6d3c",
    (16, 16, 0.5, 0, 0, 0): "9cf24e54c67e1b6fff68a30449b555da",
    (16, 16, 0.1, 1, 0, 0): "d9f7e165540876c46f7e5ee5136af344",
    (7, 151, 0.3, 2**63 - 1, 0, 0): "4bfabd41167b822832fd0f2e896be685",
    (151, 7, 0.3, -1, 1, 1): "8ce5fc2ea8636451f3e99c14f763865f",
    (129, 151, 0.9, 123456789012345, 2**32 - 1, 2**32 - 1): "74e6ba57c35d18581474a4caaf123c2f",
    (129, 151, 0.1, 123456789012345, 2**32 + 3, 7): "a2000d3e82627b66a4049b5171da1197",
    (1024, 256, 0.05, 42, 1000, 3): "e8d02cc79ad4f34f76031e5ef11fcf9d",
    (33, 4096, 0.01, 2**32, 0, 2): "7d080f4f84144dd58f6ffe38e70d27f7",
    (512, 1024, 0.5, -(2**63), 5, 31): "846cd16bb78ec651fafe7b910fd26f4e",
    (17, 33, 1 / 65536, 3, 0, 0): "f422ea01c28fb3022e4eeccae4e029f5",
    (64, 64, 65535 / 65536, 3, 0, 0): "e8866087ef250c29b75625e773050c21",
}


def fingerprint(keep):
    return hashlib.sha256(np.packbits(keep.cpu().numpy(), axis=None).tobytes()).hexdigest()[:32]


def native_output(rows, cols, p, seed, offset=0, stream=0, dtype=torch.float32, device="cpu"):
    """m itself: z is 1 everywhere."""
    x, weight = (torch.ones(size, 1, dtype=dtype, device=device) for size in (rows, cols))
    seed_words = torch.tensor([seed, offset], device=device)
    return linear_act_dropout(x, weight, activation="identity", p=p, seed=seed_words, stream=stream)


def native_mask(*case, **options):
    return native_output(*case, **options) != 0


@pytest.mark.parametrize(("counter", "key", "result"), [answer[1:] for answer in KNOWN_ANSWERS if answer[0] == 10])
def test_native_philox_gives_random123s_known_answers(counter, key, result):
    assert _C.philox4x32(words(counter), words(key)) == words(result)


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_the_reference_has_the_golden_hashes(case):
    assert fingerprint(reference.dropout_mask(*case)[0]) == GOLDEN[case]


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_the_op_has_the_golden_hashes(case, cpu_capability):
    y = native_output(*case)
    assert fingerprint(y != 0) == GOLDEN[case]
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(reference.dropout_mask(*case)[1]).item()}


@pytest.mark.cuda
@pytest.mark.parametrize("case", GOLDEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_the_op_has_the_golden_hashes(case, dtype):
    assert fingerprint(native_mask(*case, dtype=dtype, device="cuda")) == GOLDEN[case]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_dtype_change_no_bit(threads, dtype, cpu_capability):
    torch.set_num_threads(threads)
    expected, _ = reference.dropout_mask(1000, 333, 0.3, 7, 8, 9)
    assert torch.equal(native_mask(1000, 333, 0.3, 7, 8, 9, dtype=dtype), expected)


def test_leading_dimensions_are_rows_and_the_layer_s_width_is_no_matter():
    expected, scale = reference.dropout_mask(5 * 7 * 3, 21, 0.5, 1)
    x, weight = torch.full((5, 7, 3, 64), 1 / 64), torch.ones(21, 64)
    y = linear_act_dropout(x, weight, activation="identity", p=0.5, seed=1)
    assert torch.equal(y, (expected * scale).float().reshape(5, 7, 3, 21))


@pytest.mark.parametrize("p", [0.3, 1 / 65536, 65535 / 65536])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_has_the_mask_of_forward(activation, p, device):
    """With x = I, the weight's gradient is dz itself; act' is not 0 at z = 0.5 for any activation."""
    rows, cols = 100, 37
    x = torch.eye(rows, device=device)
    weight = torch.full((cols, rows), 0.5, device=device, requires_grad=True)
    slope = torch.ones(1, device=device) if activation == "prelu" else None
    y = linear_act_dropout(x, weight, activation=activation, slope=slope, p=p, seed=3)
    y.backward(torch.ones_like(y))
    expected = reference.dropout_mask(rows, cols, p, 3)[0].to(device)
    assert torch.equal(y != 0, expected)
    assert torch.equal(weight.grad.T != 0, expected)


@pytest.mark.parametrize("p", [0.5 / 65536, 1.49 / 65536, 1.5 / 65536, 0.1, 1 / 3, 65535 / 65536, 1 - 2**-18])
def test_the_op_realises_the_p_of_the_contract(p):
    y = native_output(512, 512, p, 1)
    keep, scale = reference.dropout_mask(512, 512, p, 1)
    assert torch.equal(y, keep * torch.tensor(scale))


def randint_seed():
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)


def test_a_drawn_seed_is_torch_randint_s_and_leaves_its_generator_alike():
    for start in range(50):
        torch.manual_seed(start)
        stock, generator = randint_seed(), torch.get_rng_state()
        torch.manual_seed(start)
        assert torch.equal(_C.drawn_seed(torch.device("cpu")), stock)
        assert torch.equal(torch.get_rng_state(), generator)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_draw_of_a_seed():
    torch.manual_seed(3)
    with Names() as mode:
        seed = _C.drawn_seed(torch.device("cpu"))
    assert "aten::randint" in mode.seen
    torch.manual_seed(3)
    assert torch.equal(seed, randint_seed())


def test_a_drawn_seed_is_an_error_under_vmap_as_torch_randint_is():
    draw = torch.vmap(lambda x: x * linear_act_dropout(x[None], torch.eye(3), p=0.5))
    with pytest.raises(RuntimeError, match="randomness"):
        draw(torch.ones(2, 3))
