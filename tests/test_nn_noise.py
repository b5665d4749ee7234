"""mlpkit.nn.DropConnect and GaussianNoise: masks of the contract on weights, noise from torch's generator."""

import pickle

import pytest
import torch
from torch import nn

from mlpkit import reference
from mlpkit.errors import ArgumentError
from mlpkit.nn import DropConnect, FusedLinear, GaussianNoise, memory_footprint


def rows(count=40, features=21, dtype=torch.float64):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(5), dtype=dtype)


@pytest.mark.parametrize("activation", ["identity", "relu", "prelu", "gelu"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_weights_are_dropped_by_the_mask_of_the_contract(activation, dropout):
    layer = DropConnect(21, 35, activation=activation, dropout=dropout, weight_dropout=0.3, dtype=torch.float64)
    keep, scale = reference.dropout_mask(35, 21, 0.3, seed=12, offset=6, stream=3 + 2**31)
    twin = pickle.loads(pickle.dumps(layer))
    expected = reference.linear_act_dropout(
        rows(),
        twin.weight * keep * scale,
        twin.bias,
        activation=activation,
        slope=twin.slope,
        p=dropout,
        seed=torch.tensor([12, 6]),
        stream=3,
    )
    y = layer(rows(), seed=torch.tensor([12, 6]), stream=3)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert not layer.weight.grad[~keep].any()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_in_eval_and_without_a_rate_it_is_a_fused_layer():
    layer = DropConnect(21, 35, weight_dropout=0.5, dtype=torch.float64)
    plain = FusedLinear(21, 35, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(rows()), plain(rows()))
    layer.train().weight_dropout = 0.0
    state = torch.get_rng_state()
    assert torch.equal(layer(rows()), plain(rows()))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_expected_output_is_that_of_eval():
    layer = DropConnect(21, 3, activation="identity", weight_dropout=0.5).requires_grad_(False)
    x = rows(4, dtype=torch.float32)
    samples = torch.stack([layer(x, seed=seed) for seed in range(2000)])
    error = samples.mean(0) - layer.eval()(x)
    assert (error.abs() < 5 * samples.std(0) / 2000**0.5).all()


def test_everything_dropped_leaves_the_bias():
    layer = DropConnect(21, 3, activation="identity", weight_dropout=1.0)
    assert torch.equal(layer(rows(4, dtype=torch.float32)), layer.bias.expand(4, 3))


def test_manual_seed_repeats_a_forward_and_every_forward_drops_anew():
    layer, x = DropConnect(21, 35), rows(dtype=torch.float32)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_autocast_stay(dtype):
    assert DropConnect(21, 5, dtype=dtype)(rows(dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        layer = DropConnect(21, 35, weight_dropout=0.3, activation="identity")
        y = layer(rows(dtype=torch.float32), seed=1)
    keep, scale = reference.dropout_mask(35, 21, 0.3, seed=1, stream=2**31)
    expected = rows(dtype=torch.float32) @ (layer.weight * keep * scale).T + layer.bias
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


def test_it_compiles_into_one_graph():
    torch.compiler.reset()
    layer, x = DropConnect(21, 35, dropout=0.5), rows(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, seed=torch.tensor([3, 4])), layer(x, seed=torch.tensor([3, 4])))


def test_the_footprint_counts_the_mask():
    model = nn.Sequential(DropConnect(21, 35), nn.Linear(35, 2))
    mask, dropped, bits, hidden = 4 * 21 * 35, 4 * 21 * 35, 3 * 3 * 32, 4 * 40 * 35
    layers = memory_footprint(model, 40).layers
    assert [layer.saved for layer in layers] == [mask + dropped + bits, hidden]


def test_repr_and_wrong_arguments():
    assert repr(DropConnect(4, 3, weight_dropout=0.25)) == ("DropConnect(4, 3, activation=relu, weight_dropout=0.25)")
    with pytest.raises(ArgumentError, match=r"DropConnect: weight_dropout is 1\.5; it must be a probability"):
        DropConnect(4, 3, weight_dropout=1.5)
    with pytest.raises(ArgumentError, match=r"DropConnect: stream is 2147483648; it must lie in \[0, 2\^31\)"):
        DropConnect(4, 3)(torch.randn(2, 4), stream=2**31)


def test_gaussian_noise_is_torchs_and_off_in_eval():
    x, noise = rows(400), GaussianNoise(0.5)
    torch.manual_seed(3)
    y = noise(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, x + 0.5 * torch.randn_like(x))
    assert (y - x).std().item() == pytest.approx(0.5, rel=0.05)
    assert noise.eval()(x) is x
    assert GaussianNoise(0.0)(x) is x
    assert repr(noise) == "GaussianNoise(std=0.5)"


def test_gaussian_noise_keeps_dtype_and_passes_gradients():
    x = rows(dtype=torch.bfloat16).requires_grad_()
    y = GaussianNoise(0.1)(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("std", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_a_wrong_std_is_named(std):
    with pytest.raises(ArgumentError, match=r"GaussianNoise: std is .*; it must be a finite number of at least 0"):
        GaussianNoise(std)
