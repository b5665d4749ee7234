"""The losses that guard.TrainStep knows by name."""

import pytest
import torch
from torch.nn import functional as F

from mlpkit.guard import LOSSES


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
