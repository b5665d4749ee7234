"""The losses that guard.TrainStep knows, by name and as modules of torch."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpkit.guard import LOSSES, LossSpec, TrainStep, describe


def test_every_named_loss_is_the_formula_of_its_docstring():
    output, target = torch.rand(8, 3) + 0.5, torch.rand(8, 3) + 0.5
    classes = torch.randint(3, (8,))
    difference = (output - target).abs()
    expected = {
        "cross_entropy": (output.logsumexp(1) - output[torch.arange(8), classes]).mean(),
        "bce": -(target * F.logsigmoid(output) + (1 - target) * F.logsigmoid(-output)).mean(),
        "mse": difference.square().mean(),
        "l1": difference.mean(),
        "huber": torch.where(difference < 1, 0.5 * difference.square(), difference - 0.5).mean(),
        "log_mse": (output.log() - target.log()).square().mean(),
    }
    assert set(expected) == set(LOSSES)
    for name, value in expected.items():
        got = LOSSES[name](output, classes if name == "cross_entropy" else target)
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("name", ["bce", "mse", "l1", "huber", "log_mse"])
def test_a_target_of_another_shape_is_refused_and_not_broadcast(name):
    with pytest.raises(ValueError, match=r"output is \(4, 1\), target \(4,\); shapes must be equal"):
        LOSSES[name](torch.ones(4, 1), torch.ones(4))


@pytest.mark.parametrize("name", ["bce", "mse", "l1", "huber", "log_mse"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_outputs_are_computed_in_fp32(name, dtype):
    output, target = torch.full((2, 1), 300.0, dtype=dtype), torch.full((2, 1), 1e-7)
    loss = LOSSES[name](output, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](output.float(), target), rtol=0, atol=0)


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_sum_is_the_mean_times_the_number_of_its_terms(name):
    output = torch.rand(8, 3) + 0.5
    target = torch.randint(3, (8,)) if name == "cross_entropy" else torch.rand(8, 3) + 0.5
    terms = 8 if name == "cross_entropy" else 24
    total = LOSSES[name](output, target, reduction="sum")
    torch.testing.assert_close(total, LOSSES[name](output, target) * terms)


@pytest.mark.parametrize(
    ("loss", "spec"),
    [
        ("log_mse", LossSpec("log_mse")),
        (LOSSES["l1"], LossSpec("l1")),
        (F.binary_cross_entropy_with_logits, LossSpec("bce")),
        (partial(LOSSES["log_mse"], reduction="sum"), LossSpec("log_mse", "sum")),
        (partial(F.mse_loss, reduction="sum"), LossSpec("mse", "sum")),
        (nn.MSELoss(), LossSpec("mse")),
        (nn.L1Loss(reduction="sum"), LossSpec("l1", "sum")),
        (nn.HuberLoss(delta=2.5), LossSpec("huber", delta=2.5)),
        (nn.CrossEntropyLoss(), LossSpec("cross_entropy")),
        (
            nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1, reduction="sum"),
            LossSpec("cross_entropy", "sum", label_smoothing=0.1, weight=CLASS_WEIGHTS, ignore_index=1),
        ),
        (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), LossSpec("bce", pos_weight=CLASS_WEIGHTS)),
    ],
)
def test_a_known_loss_is_described_with_its_settings(loss, spec):
    found = describe(loss)
    assert found is not None
    for name, value in vars(spec).items():
        got = getattr(found, name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got, value, rtol=0, atol=0)
        else:
            assert got == value, name


class Doubled(nn.MSELoss):
    def forward(self, output, target):
        return 2 * super().forward(output, target)


def _hooked():
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, inputs, output: 2 * output)
    return loss


@pytest.mark.parametrize(
    "loss",
    [
        None,
        "hinge",
        lambda output, target: output.sum(),
        nn.MSELoss(reduction="none"),
        nn.NLLLoss(),
        Doubled(),
        _hooked(),
        partial(F.huber_loss, delta=2.0),
        partial(F.mse_loss, reduction="none"),
    ],
)
def test_what_the_step_cannot_know_of_a_loss_it_does_not_claim(loss):
    assert describe(loss) is None


def test_settings_of_a_loss_module_are_read_as_they_are_now():
    loss = nn.CrossEntropyLoss()
    loss.label_smoothing = 0.25
    assert describe(loss).label_smoothing == 0.25


def test_a_step_with_torchs_loss_module_takes_exactly_torchs_gradients():
    target = torch.tensor([0, 1, 2, 1])
    x = torch.randn(4, 5)
    loss = nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1, reduction="sum")
    ours, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(ours.state_dict())
    result = TrainStep(ours, loss, torch.optim.SGD(ours.parameters(), lr=0.1))(x, target)
    value = loss(twin(x), target)
    value.backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert result.loss == value.item()
    torch.testing.assert_close(ours.weight, twin.weight, rtol=0, atol=0)


def test_a_missing_target_is_named_for_torchs_modules_too():
    model = nn.Linear(5, 3)
    step = TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no target came"):
        step(torch.randn(4, 5))
