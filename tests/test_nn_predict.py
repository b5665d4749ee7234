"""mlpkit.nn.predict_mc: the moments of forwards with dropout on, and nothing else changed."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpkit.errors import ArgumentError
from mlpkit.nn import MLP, DropConnect, FusedLinear, GaussianNoise, fuse, predict_mc


def rows(count=12, dtype=torch.float32):
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(5), dtype=dtype)


MODELS = {
    "stock": lambda: nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)),
    "fused": lambda: nn.Sequential(FusedLinear(7, 32, dropout=0.5), nn.Linear(32, 3)),
    "network": lambda: MLP(7, (32, 16), 3, dropout=0.5),
    "batch norm": lambda: MLP(7, (32, 16), 3, dropout=0.5, norm="batch"),
    "weights": lambda: nn.Sequential(DropConnect(7, 32), nn.Linear(32, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_mean_and_variance_are_those_of_the_samples(name):
    model = MODELS[name]().double()
    model(rows(dtype=torch.float64))  # a batch norm's statistics leave 0 and 1
    result = predict_mc(model, rows(dtype=torch.float64), 50, seed=3)
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d) or (isinstance(module, MLP) and module.norm):
            module.training = False
    torch.manual_seed(3)
    samples = torch.stack([twin(rows(dtype=torch.float64)).detach() for _ in range(50)])
    torch.testing.assert_close(result.mean, samples.mean(0))
    torch.testing.assert_close(result.variance, samples.var(0))
    assert result.variance.min() > 0
    assert (result.entropy, result.mutual_information, result.samples) == (None, None, 50)


def test_the_mean_nears_the_exact_expectation():
    # Dropout before a linear layer: mean W x, variance sum (w x)^2 p / (1 - p).
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 3))
    result = predict_mc(model, rows(), 4000, seed=1)
    variance = (rows().square() @ model[1].weight.square().T).detach()
    torch.testing.assert_close(result.variance, variance, rtol=0.15, atol=0)
    assert ((result.mean - model[1](rows())).abs() < 5 * (variance / 4000).sqrt()).all()


def test_logits_give_entropy_and_mutual_information():
    model = MLP(7, (32,), 3, dropout=0.5)
    result = predict_mc(model, rows(), 20, logits=True, seed=1)
    model.train()
    torch.manual_seed(1)
    p = torch.stack([model(rows()).detach().softmax(-1) for _ in range(20)]).double()
    entropy = -(p.mean(0) * p.mean(0).log()).sum(-1)
    information = entropy + (p * p.log()).sum(-1).mean(0)
    torch.testing.assert_close(result.mean.double(), p.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.mutual_information.double(), information, rtol=1e-4, atol=1e-6)
    assert 0 < result.mutual_information.min() <= result.entropy.max() <= math.log(3)


def test_certain_logits_have_no_entropy_and_no_nan():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 1000.0, 0.0]))
    result = predict_mc(model, rows(), 5, logits=True)
    assert not result.entropy.any()
    assert not result.mutual_information.any()


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_modes_buffers_gradients_and_random_state_stay(name, seed):
    model = MODELS[name]()
    list(model.modules())[-1].eval()
    modes, state = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    result = predict_mc(model, rows(), 3, seed=seed)
    assert not result.mean.requires_grad
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_error_in_the_model_leaves_it_as_it_was():
    model = MODELS["batch norm"]().eval()
    with pytest.raises(ValueError, match="features"):
        predict_mc(model, torch.randn(3, 8), 3)
    assert not any(module.training for module in model.modules())


def test_a_seed_repeats_a_prediction_and_so_does_the_generator():
    model = MODELS["network"]()
    means = [predict_mc(model, rows(), 3, seed=seed).mean for seed in (1, 1, 2)]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])
    torch.manual_seed(7)
    first = predict_mc(model, rows(), 3).mean
    assert torch.equal(predict_mc(model, rows(), 3).mean, first)
    torch.manual_seed(8)
    assert not torch.equal(predict_mc(model, rows(), 3).mean, first)


def test_a_functional_dropout_is_seen_after_the_fusion():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(7, 3)

        def forward(self, x):
            return F.dropout(torch.tanh(self.fc(x)), 0.5, self.training)

    with pytest.raises(ArgumentError, match="Net has no dropout layer"):
        predict_mc(Net(), rows(), 3)
    assert predict_mc(fuse(Net()), rows(), 30).variance.min() > 0


def test_noise_of_other_kinds_stays_off():
    model = nn.Sequential(GaussianNoise(100.0), nn.Linear(7, 3), nn.Dropout(0.1))
    assert predict_mc(model, rows(), 20).mean.abs().max() < 10


@pytest.mark.parametrize("x", [(rows(),), {"input": rows()}])
def test_tuples_and_dicts_are_passed_on(x):
    assert predict_mc(nn.Dropout(0.5), x, 3).mean.shape == (12, 7)


def test_half_precision_is_summed_in_float32():
    result = predict_mc(MODELS["fused"]().bfloat16(), rows(dtype=torch.bfloat16), 5)
    assert (result.mean.dtype, result.variance.dtype) == (torch.float32, torch.float32)


class Pair(nn.Dropout):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("model", "samples", "options", "message"),
    [
        (nn.Dropout(0.5), 1, {}, "samples is 1; it must be at least 2"),
        (nn.Dropout(0.5), 2.5, {}, "samples is 2.5; it must be an int"),
        (nn.Dropout(0.5), 3, {"seed": 0.5}, "seed is 0.5; it must be an int or None"),
        (nn.Dropout(0.0), 3, {}, "Dropout has no dropout layer"),
        (nn.Linear(7, 3), 3, {}, "Linear has no dropout layer"),
        (Pair(0.5), 3, {}, "the model's output is tuple"),
        ("model", 3, {}, "model is str"),
    ],
)
def test_wrong_arguments_are_named(model, samples, options, message):
    with pytest.raises(ArgumentError, match=f"predict_mc: {message}"):
        predict_mc(model, rows(), samples, **options)
