"""mlpkit.init: draws with the variance they promise, and a check that measures without touching."""

import copy
import math

import pytest
import torch
from torch import nn

from mlpkit import init
from mlpkit.errors import ArgumentError, ShapeError
from mlpkit.nn import MLP

STOCK = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "he_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "he_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "normal": lambda weight: nn.init.normal_(weight, std=0.01),
}


@pytest.mark.parametrize("name", init.NAMES)
@pytest.mark.parametrize("shape", [(20, 30), (8, 4, 3, 3)])
def test_a_draw_equals_pytorchs_own(name, shape):
    torch.manual_seed(1)
    ours = getattr(init, name)(torch.empty(shape))
    torch.manual_seed(1)
    stock = STOCK[name](torch.empty(shape))
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("name", init.NAMES)
def test_a_draw_has_the_variance_of_its_formula(name):
    weight = getattr(init, name)(torch.empty(300, 200), generator=torch.Generator().manual_seed(2))
    expected = {"xavier": 2 / 500, "he": 2 / 200, "normal": 1e-4}[name.partition("_")[0]]
    assert init.variance(name, 200, 300) == pytest.approx(expected)
    assert weight.var().item() == pytest.approx(expected, rel=0.03)
    assert abs(weight.mean().item()) < 3 * (expected / weight.numel()) ** 0.5


def test_a_generator_repeats_a_draw_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    draws = [init.normal(torch.empty(3, 4), 2.0, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", init.NAMES)
def test_a_name_applies_to_all_layers_of_a_model_and_zeroes_their_biases(name):
    model = nn.Sequential(nn.Conv1d(3, 40, 5), nn.BatchNorm1d(40), nn.Flatten(), nn.Linear(400, 30), MLP(30, (50,), 2))
    norm_before = copy.deepcopy(model[1].state_dict())
    assert init.apply(model, name, generator=torch.Generator().manual_seed(3)) is model
    layers = [model[0], model[3], *model[4].layers]
    for layer in layers:
        fan_in, fan_out = layer.weight[0].numel(), layer.weight.numel() // layer.weight.shape[1]
        assert layer.weight.var().item() == pytest.approx(init.variance(name, fan_in, fan_out), rel=0.35)
        assert not layer.bias.any()
    torch.testing.assert_close(model[1].state_dict(), norm_before, rtol=0, atol=0)


def test_the_std_of_a_normal_start_is_the_callers():
    model = init.apply(nn.Linear(200, 200), "normal", std=0.5)
    assert model.weight.std().item() == pytest.approx(0.5, rel=0.02)


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match="the name is 'ones'; it must be one of xavier_uniform"):
        init.apply(nn.Linear(2, 2), "ones")
    with pytest.raises(ArgumentError, match="ReLU has no linear or convolution layer"):
        init.apply(nn.ReLU(), "normal")
    with pytest.raises(ShapeError, match=r"the weight has shape \(3,\)"):
        init.he_normal(torch.empty(3))
    for std in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="std is"):
            init.normal(torch.empty(3, 3), std)


def deep(name, activation="tanh", layers=5, width=100):
    return MLP(width, (width,) * layers, width, activation=activation, init=name)


def batch(rows=256, features=100):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(4))


def test_xavier_keeps_variances_and_a_small_normal_start_loses_them():
    kept = init.check(deep("xavier_uniform", "identity"), batch())
    lost = init.check(deep("normal", "identity"), batch())
    for layer in kept.layers[1:]:
        assert layer.forward_ratio == pytest.approx(1, abs=0.25)
    for layer in kept.layers[:-1]:
        assert layer.backward_ratio == pytest.approx(1, abs=0.25)
    assert [layer.forward_ratio for layer in lost.layers[1:]] == pytest.approx([0.01] * 5, rel=0.3)
    assert [layer.backward_ratio for layer in lost.layers[:-1]] == pytest.approx([0.01] * 5, rel=0.3)


def test_variances_are_those_of_a_forward_and_backward_by_hand():
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)).double()
    x = batch().double()
    result = init.check(model, x)
    hidden = model[1](model[0](x))
    noise = torch.randn(256, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = noise @ model[2].weight
    first, last = result.layers
    assert first.forward_variance == pytest.approx(hidden.var(correction=0).item())
    assert first.backward_variance == pytest.approx(gradient.var(correction=0).item())
    assert last.forward_ratio == pytest.approx(model(x).var(correction=0).item() / hidden.var(correction=0).item())
    assert first.weight_variance == pytest.approx(model[0].weight.var(correction=0).item())
    assert first.expected_variance == pytest.approx(2 / 150)


def test_an_activation_called_as_a_function_counts_too():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(100, 50), nn.Linear(50, 10)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model = Functional()
    modules = nn.Sequential(model.a, nn.ReLU(), model.b)
    ours, theirs = init.check(model, batch()), init.check(modules, batch())
    assert [layer.forward_variance for layer in ours.layers] == [layer.forward_variance for layer in theirs.layers]
    assert [layer.name for layer in ours.layers] == ["a", "b"]


def test_identical_units_are_counted():
    model = deep("xavier_uniform")
    with torch.no_grad():
        model.layers[1].weight[3:7] = model.layers[1].weight[3]
        model.layers[2].weight[3:7] = model.layers[2].weight[3]
        model.layers[2].bias[3:7] = torch.arange(4.0)
    assert [layer.symmetric for layer in init.check(model, batch()).layers] == [0, 4, 0, 0, 0, 0]


def test_dead_units_are_counted():
    model = deep("he_normal", "relu", layers=2)
    with torch.no_grad():
        model.layers[0].bias[:25] = -1e6
    assert [layer.dead for layer in init.check(model, batch()).layers] == [0.25, 0.0, 0.0]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_saturated_outputs_are_counted(activation):
    model = deep("xavier_uniform", activation, layers=1)
    assert init.check(model, batch()).layers[0].saturated < 0.05
    with torch.no_grad():
        model.layers[0].bias[:50] = 100.0
        model.layers[0].bias[50:75] = -100.0
    first, last = init.check(model.to_sequential(), batch()).layers
    assert first.saturated == pytest.approx(0.75, abs=0.02)
    assert last.saturated is None


def test_a_check_leaves_mode_gradients_buffers_and_random_state_alone():
    class Noisy(MLP):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    model = Noisy(100, (50, 50), 10, norm="batch", dropout=0.5)
    model.blocks[0].eval()
    model(batch()).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    first = init.check(model, batch())
    assert init.check(model, batch()) == first
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_frozen_model_has_no_backward_numbers():
    result = init.check(nn.Linear(100, 10).requires_grad_(False), batch())
    assert result.layers[0].backward_variance is None


def test_a_check_prints_as_a_table():
    lines = str(init.check(deep("he_uniform", "relu", layers=1), batch())).splitlines()
    assert lines[0] == "init.check against he_uniform"
    assert lines[1].split()[0] == "layer"
    assert [line.split()[0] for line in lines[2:-1]] == ["layers.0", "layers.1"]
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert lines[-1].startswith("product of spectral norms: ")


def test_spectral_norm_and_condition_number_are_those_of_a_known_matrix():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2), nn.Unflatten(1, (2, 1)), nn.Conv1d(2, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(3, 3))[0] @ torch.diag(torch.tensor([6.0, 3.0, 0.5])))
        model[2].weight.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        model[4].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]])[..., None])
    result = init.check(model, torch.randn(5, 3))
    assert [layer.spectral_norm for layer in result.layers] == pytest.approx([6, 2, 4], rel=1e-5)
    assert [layer.condition_number for layer in result.layers] == pytest.approx([12, math.inf, 4 / 3], rel=1e-5)
    assert result.product_bound == pytest.approx(48, rel=1e-5)


def test_the_product_of_spectral_norms_bounds_what_the_network_does():
    model = deep("he_normal", "relu").double()
    bound = init.check(model, batch().double()).product_bound
    x = batch().double()
    step = 1e-3 * torch.randn_like(x)
    stretch = (model(x + step) - model(x)).norm(dim=1) / step.norm(dim=1)
    assert 0 < stretch.max() <= bound


def test_a_weight_that_is_not_finite_has_no_singular_values():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    assert math.isnan(init.check(model, torch.ones(2, 4)).layers[0].spectral_norm)


def test_a_check_refuses_what_it_cannot_measure():
    with pytest.raises(ArgumentError, match="no linear or convolution layer of ReLU was called"):
        init.check(nn.ReLU(), batch())

    class Pair(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, y

    with pytest.raises(ArgumentError, match="output is tuple; it must be a floating tensor"):
        init.check(Pair(100, 2), batch())
    with pytest.raises(ArgumentError, match="must be one of"):
        init.check(nn.Linear(100, 2), batch(), init="ones")
