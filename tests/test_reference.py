"""The reference itself: Philox against Random123, the mask against a second, word-by-word reading of its contract."""

import math

import pytest
import torch
from torch.nn import functional as F

from mlpkit.errors import ArgumentError
from mlpkit.reference import ACTIVATIONS, activate, dropout_mask, linear_act_dropout, philox4x32

# Lines of Random123's kat_vectors: rounds, counter, key, result.
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("rounds", "counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(rounds, counter, key, result):
    assert philox4x32(words(counter), words(key), rounds).tolist() == words(result)


def test_philox_of_many_counters_is_philox_of_each():
    counters = [words(counter) for rounds, counter, _, _ in KNOWN_ANSWERS if rounds == 10]
    keys = [words(key) for rounds, _, key, _ in KNOWN_ANSWERS if rounds == 10]
    results = [words(result) for rounds, _, _, result in KNOWN_ANSWERS if rounds == 10]
    assert philox4x32(counters, keys).tolist() == results
    assert philox4x32([counters], keys[1]).shape == (1, 3, 4)


def bits_word_by_word(row, col, cols, seed, offset, stream):
    """The 16 bits of one element, read off the sentences of docs/masks.md in plain integers."""
    tile = (row // 16) * math.ceil(cols / 16) + col // 16
    r, c = row % 16, col % 16
    lane = (r % 8) * 4 + (c % 8) // 2
    counter = [tile & 0xFFFFFFFF, (tile >> 32) << 5 | lane, offset & 0xFFFFFFFF, stream]
    call = philox4x32(counter, [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    word = int(call[(1 if r >= 8 else 0) + (2 if c >= 8 else 0)])
    return word >> 16 if c % 2 else word & 0xFFFF


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 33), (33, 7), (16, 16), (17, 31)])
@pytest.mark.parametrize(("seed", "offset", "stream"), [(0, 0, 0), (-1, 2**40 + 5, 3), (2**63 - 1, 1, 2**32 - 1)])
def test_mask_follows_the_contract_element_by_element(rows, cols, seed, offset, stream):
    keep, scale = dropout_mask(rows, cols, 0.3, seed, offset, stream)
    threshold = 19661  # 0.3 * 65536 = 19660.8
    expected = [
        [bits_word_by_word(row, col, cols, seed, offset, stream) >= threshold for col in range(cols)]
        for row in range(rows)
    ]
    assert keep.tolist() == expected
    assert scale == 65536 / (65536 - threshold)


@pytest.mark.parametrize(
    ("p", "kept", "scale"),
    [(0.0, 1.0, 1.0), (2**-18, 1.0, 1.0), (1.0, 0.0, 0.0), (1 - 2**-18, 0.0, 0.0), (0.5, None, 2.0)],
)
def test_the_realised_p_is_a_whole_number_of_65536ths(p, kept, scale):
    keep, factor = dropout_mask(64, 64, p, 1)
    assert factor == scale
    if kept is not None:
        assert keep.double().mean() == kept


def test_half_a_65536th_rounds_up():
    assert dropout_mask(1, 1, 0.5 / 65536, 0)[1] == 65536 / 65535
    assert dropout_mask(1, 1, 1.5 / 65536, 0)[1] == 65536 / 65534


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf])
def test_p_outside_0_to_1_is_refused(p):
    with pytest.raises(ArgumentError, match=r"must lie in \[0, 1\]"):
        dropout_mask(2, 2, p, 0)


def test_the_reference_without_dropout_is_stock_pytorch():
    x, weight, bias = torch.randn(3, 5, 7), torch.randn(4, 7), torch.randn(4)
    assert torch.equal(linear_act_dropout(x, weight, bias), F.relu(F.linear(x, weight, bias)))
    assert torch.equal(
        linear_act_dropout(x, weight, p=0.5, training=False, activation="tanh"), F.linear(x, weight).tanh()
    )
    slope = torch.rand(4)
    prelu = linear_act_dropout(x, weight, bias, activation="prelu", slope=slope)
    assert torch.equal(prelu, F.prelu(F.linear(x, weight, bias).movedim(-1, 1), slope).movedim(1, -1))


def test_the_reference_multiplies_by_the_mask_and_so_does_its_gradient():
    x, weight = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    keep, scale = dropout_mask(15, 4, 0.4, 11, 12, 13)
    mask = keep.double().reshape(3, 5, 4) * scale
    y = linear_act_dropout(x, weight, activation="identity", p=0.4, seed=torch.tensor([11, 12]), stream=13)
    assert torch.equal(y, F.linear(x, weight) * mask)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(grad, torch.einsum("abo,abi->oi", mask, x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_the_reference_takes_empty_inputs(shape):
    y = linear_act_dropout(torch.ones(shape), torch.ones(0, shape[-1]), p=0.5, seed=1)
    assert y.shape == (*shape[:-1], 0)
    y = linear_act_dropout(torch.ones(shape), torch.ones(3, shape[-1]), p=0.5, seed=1)
    assert y.shape == (*shape[:-1], 3)


def test_a_dropped_inf_is_nan():
    x = torch.full((4, 1), math.inf)
    y = linear_act_dropout(x, torch.ones(8, 1), p=0.5, seed=3)
    keep, _ = dropout_mask(4, 8, 0.5, 3)
    assert torch.equal(y.isinf(), keep)
    assert torch.equal(y.isnan(), ~keep)


def test_an_unknown_activation_is_told_the_known_ones():
    with pytest.raises(ArgumentError) as caught:
        activate(torch.ones(1), "swish")
    assert "'swish'" in str(caught.value)
    assert all(name in str(caught.value) for name in ACTIVATIONS)
    with pytest.raises(ArgumentError, match="prelu wants a slope tensor, got None"):
        activate(torch.ones(1), "prelu")


def test_the_reference_asks_for_the_seed_that_it_does_not_draw():
    with pytest.raises(ArgumentError, match="seed is None"):
        linear_act_dropout(torch.ones(1, 1), torch.ones(1, 1), p=0.5)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_passes_gradcheck(activation, p):
    x, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in [(3, 2), (4, 2), (4,)])
    slope = torch.rand(4, dtype=torch.float64, requires_grad=True) if activation == "prelu" else None

    def run(*tensors):
        return linear_act_dropout(*tensors[:3], activation=activation, slope=slope, p=p, seed=2)

    assert torch.autograd.gradcheck(run, (x, weight, bias) if slope is None else (x, weight, bias, slope))
