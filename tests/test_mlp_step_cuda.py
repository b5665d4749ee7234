"""The ops of small networks on a CUDA device: the mask contract, the precision rule, and what they refuse."""

import itertools

import closeness
import pytest
import torch
from torch.nn import functional as F

from mlpkit.reference import dropout_mask

pytestmark = pytest.mark.cuda
SEED = (-0x123456789ABCDEF, 7)


def make(widths, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for i, o in itertools.pairwise(widths):
        parameters += [torch.randn(o, i, generator=generator) / i**0.5, 0.1 * torch.randn(o, generator=generator)]
    return torch.randn(rows, widths[0], generator=generator), parameters


def forward(x, parameters, p, dtype=torch.bfloat16, activation="relu"):
    layers = len(parameters) // 2
    seed = torch.tensor(SEED, device="cuda")
    moved = [one.cuda() for one in parameters]
    half = dtype == torch.float16
    y = torch.ops.mlpkit.mlp_step_forward(
        x.cuda(), moved, [True] * layers, seed, activation, 0.01, [p] * (layers - 1), half
    )
    return y.cpu()


def in_torch(x, parameters, p, dtype):
    h = x.to(dtype)
    for i in range(0, len(parameters), 2):
        h = F.linear(h, parameters[i].to(dtype), parameters[i + 1].to(dtype))
        if i + 2 < len(parameters):
            kept, scale = dropout_mask(*h.shape, p, *SEED, i // 2)
            h = F.relu(h) * (kept.double() * scale).to(dtype)
    return h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [[20, 33, 17, 10], [100, 128, 4], [7, 256, 256, 3]], ids=str)
def test_outputs_err_no_more_than_torch(widths, dtype):
    ours, stock, exact = [], [], []
    for seed in closeness.SEEDS:
        x, parameters = make(widths, 150 + seed, seed)
        ours.append(forward(x, parameters, 0.3, dtype)[:150])
        stock.append(in_torch(x, parameters, 0.3, dtype)[:150])
        exact.append(in_torch(x, parameters, 0.3, torch.float64)[:150])
    closeness.assert_no_worse_than(ours, stock, exact, "outputs")


@pytest.mark.parametrize("rows", [16, 1000, 40_001])
def test_masks_are_the_mask_contract(rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(1, 8, (rows, 40), generator=generator).float()
    eye, zeros = torch.eye(40), torch.zeros(40)
    y = forward(x, [eye, zeros, eye, zeros], 0.5)
    kept, scale = dropout_mask(rows, 40, 0.5, *SEED, 0)
    assert torch.equal(y.double(), x.double() * kept * scale)


def test_two_runs_are_bitwise_equal():
    x, parameters = make([20, 33, 17, 10], 5000)
    assert torch.equal(forward(x, parameters, 0.3), forward(x, parameters, 0.3))


def test_a_layer_that_is_too_wide_is_refused():
    x, parameters = make([20, 257, 10], 8)
    with pytest.raises(ValueError, match="mlp_step: the network is not a small one: its widths are 1 to 256"):
        forward(x, parameters, 0.0)


def test_prelu_is_refused():
    x, parameters = make([20, 33, 10], 8)
    with pytest.raises(ValueError, match="mlp_step: activation is prelu"):
        forward(x, parameters, 0.0, activation="prelu")
