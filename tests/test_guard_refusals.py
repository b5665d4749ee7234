"""guard.TrainStep says in one sentence what it cannot work with, before anything has changed."""

import copy
import math

import pytest
import torch
from torch import nn

from mlpkit.errors import ArgumentError, DeviceError, DtypeError, MlpkitError
from mlpkit.guard import LossScale, TrainStep, optim


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


def guarded(loss="cross_entropy", model=None, **options):
    model = model or network()
    return TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), **options)


BAD_OPTIONS = {
    "clip_norm is 0": {"clip_norm": 0},
    "clip_norm is -1": {"clip_norm": -1.0},
    "clip_norm is nan": {"clip_norm": math.nan},
    "accumulate is 0": {"accumulate": 0},
    "precision is 'fp8'; it must be one of fp32, fp16, bf16": {"precision": "fp8"},
    "on_nonfinite is 'ignore'; it must be one of skip, raise": {"on_nonfinite": "ignore"},
    "init_scale is 0.0": {"init_scale": 0.0},
    "init_scale is -1": {"init_scale": -1},
    "init_scale is inf": {"init_scale": math.inf},
    "init_scale is 1e-40; it and its reciprocal": {"init_scale": 1e-40},
    "init_scale is 1e\\+39; it and its reciprocal": {"init_scale": 1e39},
    "loss is 'hinge'; it must be one of cross_entropy, bce, mse, l1, huber, log_mse": {"loss": "hinge"},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_a_wrong_option_is_refused_in_one_sentence(message):
    with pytest.raises(ArgumentError, match=message):
        guarded(**BAD_OPTIONS[message])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floor": 8.0, "init": 4.0}, "init is 4.0; it must lie between floor 8.0"),
        ({"growth": 1.0}, "growth is 1.0"),
        ({"backoff": 1.0}, "backoff is 1.0"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"ceiling": math.nan}, "ceiling is nan"),
    ],
)
def test_a_wrong_setting_of_the_scale_is_refused(settings, message):
    with pytest.raises(ArgumentError, match=message):
        LossScale(**settings)


def test_parts_that_do_not_fit_are_refused():
    model, other = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    schedulers = torch.optim.lr_scheduler
    for arguments, options, message in [
        (("net", optimizer), {}, "model is str"),
        ((model, "sgd"), {}, "optimizer is str"),
        ((model, elsewhere), {}, r"parameter 0 of group 0, shape \(8, 5\), of the optimizer is not a parameter"),
        ((model, torch.optim.LBFGS(model.parameters())), {}, "LBFGS wants a closure"),
        ((model, optimizer), {"scheduler": schedulers.ReduceLROnPlateau(optimizer)}, "wants a metric"),
        ((model, optimizer), {"scheduler": schedulers.StepLR(elsewhere, 1)}, "drives another optimizer"),
        ((model, optimizer), {"scheduler": 3}, "scheduler is int"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            TrainStep(arguments[0], "mse", arguments[1], **options)
    half = network().half()
    with pytest.raises(DtypeError, match=r"'0.weight' is torch.float16; precision='fp16' is autocast"):
        guarded(model=half, precision="fp16")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ArgumentError, match="none of the optimizer's parameters requires a gradient"):
        TrainStep(model, "mse", optimizer)
    lazy = nn.LazyLinear(3)
    with pytest.raises(ArgumentError, match="'weight' is not initialised"):
        guarded(model=lazy)
    phased = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(DtypeError, match="complex parameters are not supported"):
        guarded(model=phased)


def replace_weight(model):
    model[0].weight = nn.Parameter(model[0].weight.detach())


def replace_layer(model):
    model[4] = nn.Linear(8, 3)


REPLACED = {
    "a parameter": (r"parameter 0 of group 0, shape \(8, 5\),", replace_weight),
    "a layer": (r"parameter 4 of group 0, shape \(3, 8\),", replace_layer),
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, optim.SGD])
def test_what_was_replaced_after_the_optimizer_was_made_is_noticed(what, make):
    message, replace = REPLACED[what]
    model = network()
    step = TrainStep(model, "cross_entropy", make(model.parameters(), lr=0.1))
    step(*batch())
    replace(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(ArgumentError, match=message + " of the optimizer is not a parameter of the model"):
            step(*batch())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_layer_that_the_optimizer_is_given_too_is_trained():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, "cross_entropy", optimizer)
    step(*batch())
    model[4] = nn.Linear(8, 3)
    optimizer.param_groups[0]["params"][4:] = model[4].parameters()
    before = model[4].weight.detach().clone()
    assert not step(*batch()).skipped
    assert not torch.equal(before, model[4].weight)
    assert step(batch()[0] * math.inf, batch()[1]).skipped


LOSS_ERRORS = {
    "the loss is float": lambda output, target: 1.0,
    r"the loss has shape \(16, 3\); it must be a scalar": lambda output, target: output,
    "the loss is torch.complex64": lambda output, target: output.sum().to(torch.complex64),
    "the loss does not require a gradient": lambda output, target: output.detach().sum(),
}


@pytest.mark.parametrize("message", LOSS_ERRORS)
def test_a_loss_that_cannot_be_followed_back_is_refused_and_nothing_has_changed(message):
    step = guarded(LOSS_ERRORS[message])
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(ArgumentError, match=message):
        step(*batch())
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)


def test_a_loss_that_reaches_no_parameter_is_refused():
    def elsewhere(output, target):
        return torch.ones((), requires_grad=True) * 2

    with pytest.raises(ArgumentError, match=r"no parameter received a gradient \(the first is '0.weight'\)"):
        guarded(elsewhere)(*batch())


def test_a_named_loss_without_a_target_is_refused():
    step = guarded()
    with pytest.raises(ArgumentError, match=r"no target came; call step\(inputs, target\)"):
        step(batch()[0])
    assert not guarded(lambda output, target: output.square().mean())(batch()[0]).skipped


def test_sparse_gradients_are_refused_by_name():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 3, sparse=True)

        def forward(self, x):
            return self.table(x)

    step = guarded("mse", Words())
    with pytest.raises(ArgumentError, match=r"the gradient of 'table\.weight' is sparse"):
        step(torch.tensor([1, 2]), torch.zeros(2, 3))
    assert step.model.table.weight.grad is None


@pytest.mark.parametrize("rate", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_learning_rate_that_is_no_number_is_refused_before_anything_changes(rate):
    step = guarded()
    before = copy.deepcopy(step.model.state_dict())
    step.optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ArgumentError, match=r"lr of parameter group 0 is (nan|inf)"):
        step(*batch())
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)


def test_all_errors_are_mlpkits_own():
    with pytest.raises(MlpkitError):
        guarded(loss=3)


def test_parameters_on_several_devices_are_refused_by_name():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3, device="meta"))
    with pytest.raises(DeviceError, match=r"parameter '1\.weight' is on meta, others on cpu; one is supported"):
        guarded(model=model)


class Ignores(nn.Module):
    """A network one of whose layers takes no part."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, optim.Adam])
def test_parameters_without_a_gradient_are_named_once(kind):
    model = Ignores()
    step = TrainStep(model, "cross_entropy", kind(model.parameters(), lr=0.1))
    said = r"2 of 4 parameters got no gradient in the first step: 'unused.weight', 'unused.bias'; the loss"
    with pytest.warns(UserWarning, match=said):
        step(*batch())
    before = copy.deepcopy(model.unused.state_dict())
    step(*batch())
    assert all(torch.equal(before[name], value) for name, value in model.unused.state_dict().items())
