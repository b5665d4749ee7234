"""Layers and networks of drawn shapes, dtypes, strides and options: no worse than stock, no layout changes a bit."""

import random

import pytest
import torch
from linear_act_dropout_cases import DTYPES, LAYOUTS, Case, assert_close

from mlpkit.functional import linear_act_dropout, mlp
from mlpkit.reference import ACTIVATIONS

SIZES = [0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 70]


def laid_out(rng, *shape, dtype):
    """Numbers in a layout that is drawn: any order of dimensions, steps, an offset, a dimension that is repeated."""
    steps = [rng.choice([1, 1, 2, 3]) for _ in shape]
    order = rng.sample(range(len(shape)), len(shape))
    repeated = rng.choice([None, *range(len(shape))]) if rng.random() < 0.3 else None
    sizes = [1 if dim == repeated else shape[dim] * steps[dim] + 1 for dim in order]
    values = torch.randn(sizes).to(dtype).permute([order.index(dim) for dim in range(len(shape))])
    begins = [0 if dim == repeated else rng.choice([0, 1]) for dim in range(len(shape))]
    ends = [1 if dim == repeated else begins[dim] + shape[dim] * steps[dim] for dim in range(len(shape))]
    return values[tuple(map(slice, begins, ends, steps))].expand(shape)


def packed(tensor):
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def outcome(function, tensors, dy, **options):
    """y and the gradients of all that is given."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)]


def draw_options(rng):
    activation = rng.choice(ACTIVATIONS)
    return {"activation": activation, "p": rng.choice([0.0, 0.3, 1.0]), "seed": rng.randrange(2**63), "stream": 2}


@pytest.mark.parametrize("number", range(150))
def test_a_layer_in_any_layout_is_bit_for_bit_the_packed_one(number):
    rng = random.Random(number)
    dtype, leading = rng.choice(DTYPES), [rng.choice(SIZES[:6]) for _ in range(rng.choice([0, 1, 2]))]
    rows, inner, cols = (rng.choice(SIZES) for _ in range(3))
    x = laid_out(rng, *leading, rows, inner, dtype=dtype)
    weight = laid_out(rng, cols, inner, dtype=dtype)
    bias = laid_out(rng, cols, dtype=dtype) if rng.random() < 0.7 else None
    dy = laid_out(rng, *leading, rows, cols, dtype=dtype)
    options = draw_options(rng)
    slope = laid_out(rng, rng.choice([1, cols]) if cols else 1, dtype=dtype)

    def layer(x, weight, bias, slope=None):
        return linear_act_dropout(x, weight, bias, slope=slope, **options)

    tensors = [x, weight, bias] + ([slope] if options["activation"] == "prelu" else [])
    loose, tight = outcome(layer, tensors, dy), outcome(layer, list(map(packed, tensors)), packed(dy))
    for a, b in zip(loose, tight, strict=True):
        assert torch.equal(a, b), f"{dtype} {tuple(x.shape)} {x.stride()} {tuple(weight.shape)} {options}"
    assert loose[0].shape == dy.shape
    assert loose[0].dtype == dtype


@pytest.mark.parametrize("number", range(60))
def test_a_drawn_layer_errs_no_more_than_stock(number):
    rng = random.Random(1000 + number)
    rows, inner, cols = (rng.choice(SIZES[1:]) for _ in range(3))
    layout = rng.choice(["contiguous", *(name for name in LAYOUTS if name != "leading" or rows % 3 == 0)])
    activation = rng.choice(ACTIVATIONS)
    slopes = rng.choice([1, cols]) if activation == "prelu" else 0
    p, bias = rng.choice([0.0, 0.3, 0.9]), rng.random() < 0.7
    assert_close(linear_act_dropout, Case(rows, inner, cols, activation, p, bias, slopes, layout), rng.choice(DTYPES))


@pytest.mark.parametrize("number", range(60))
def test_a_network_in_any_layout_is_bit_for_bit_its_layers(number):
    rng = random.Random(2000 + number)
    dtype, widths = rng.choice(DTYPES), [rng.choice(SIZES[1:]) for _ in range(rng.choice([2, 3, 4]))]
    rows, layers = rng.choice(SIZES), len(widths) - 1
    tensors = [laid_out(rng, rows, widths[0], dtype=dtype)]
    tensors += [laid_out(rng, widths[i + 1], widths[i], dtype=dtype) for i in range(layers)]
    tensors += [laid_out(rng, width, dtype=dtype) for width in widths[1:]]
    dy = laid_out(rng, rows, widths[-1], dtype=dtype)
    activation = rng.choice([name for name in ACTIVATIONS if name != "prelu"])
    options = {"activation": activation, "p": rng.choice([0.0, 0.3]), "seed": 5}

    def whole(x, *parameters):
        return mlp(x, parameters[:layers], parameters[layers:], **options)

    def one_by_one(x, *parameters):
        for i, (weight, bias) in enumerate(zip(parameters[:layers], parameters[layers:], strict=True)):
            last = {"activation": "identity"} if i == layers - 1 else options
            x = linear_act_dropout(x, weight, bias, stream=i, **last)
        return x

    tight = outcome(one_by_one, list(map(packed, tensors)), packed(dy))
    for a, b in zip(outcome(whole, tensors, dy), tight, strict=True):
        assert torch.equal(a, b), f"{dtype} rows {rows} widths {widths} {options}"
