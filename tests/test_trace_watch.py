"""The watch level: what it notes, what it foretells, and how it comes from a bad step to the operation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

from mlpkit.trace import Tracer
from mlpkit.trace._watch import steps_left


class Root(nn.Module):
    """A square root of its input: finite at 0, where its slope is not; NaN below."""

    def forward(self, x):
        return torch.sqrt(x)  # mark: root


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))


def train(model, steps, batch=lambda step: torch.randn(16, 8), optimizer_of=None, loss_of=None, tracer=None):
    optimizer = (optimizer_of or (lambda p: torch.optim.SGD(p, 1e-2)))(model.parameters())
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        output = model(batch(step))
        loss = loss_of(output) if loss_of else F.mse_loss(output, torch.ones_like(output))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses


def test_a_healthy_run_is_healthy_and_every_step_leaves_a_row():
    model = network()
    with Tracer(model, level="watch") as tracer:
        train(model, 12)
    assert tracer.diagnosis.verdict == "healthy"
    assert tracer.diagnosis.sentence.startswith("No failure in 12 steps: no output of a module")
    rows = tracer._watching.watch.rows
    assert [row.step for row in rows] == list(range(12))
    assert set(rows[-1].outputs) >= {"0", "1", "2", "4"}
    assert set(rows[-1].gradients) == {name for name, _ in model.named_parameters()}
    assert rows[-1].parameters["1.running_mean"] == model[1].running_mean.abs().max().item()
    assert rows[-1].parameters["0.weight"] == model[0].weight.detach().abs().max().item()


def test_a_bad_forward_is_replayed_down_to_the_operation():
    model = nn.Sequential(nn.Linear(8, 4), Root(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    with Tracer(model, level="watch") as tracer:
        train(model, 3, lambda step: torch.full((4, 8), -1.0 if step == 2 else 1.0), lambda p: torch.optim.SGD(p, 1e-9))
    found = tracer.diagnosis
    assert (found.verdict, found.step, found.phase, found.op) == ("failure", 2, "forward", "sqrt")
    assert (found.module, found.cause) == ("1", "sqrt_of_negative")
    assert "test_trace_watch.py" in found.location


def test_a_bad_gradient_is_replayed_through_the_backward():
    model = nn.Sequential(nn.Linear(8, 4), Root())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    with Tracer(model, level="watch") as tracer:
        train(model, 2, lambda step: torch.full((4, 8), float(step == 0)), lambda p: torch.optim.SGD(p, 0.0))
    found = tracer.diagnosis
    assert (found.verdict, found.step, found.phase, found.node) == ("failure", 1, "backward", "SqrtBackward0")
    assert found.module == "1"


def test_dropout_is_replayed_with_the_same_mask():
    class Fragile(nn.Module):
        def forward(self, x):
            return torch.log(F.dropout(x, 0.5, training=True))

    model = nn.Sequential(nn.Linear(4, 4), Fragile())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
    with Tracer(model, level="watch") as tracer:
        train(model, 1, lambda step: torch.ones(8, 4))
    assert (tracer.diagnosis.op, tracer.diagnosis.cause) == ("log", "log_of_zero")


def test_a_loss_outside_of_modules_cannot_be_replayed_and_what_follows_is_observed():
    model = nn.Linear(8, 1)
    with Tracer(model, level="watch") as tracer:
        train(
            model, 3, loss_of=lambda output: torch.log(output * 0).sum(), optimizer_of=lambda p: torch.optim.SGD(p, 0.0)
        )
    first = tracer.diagnoses[0]
    assert (first.verdict, first.step) == ("failure", 0)
    assert (
        "cannot be replayed (it did not arise inside the modules); the steps that follow are observed" in first.sentence
    )
    assert any(one.cause == "external" for one in tracer.diagnoses[1:])  # the parameters, which step 0 made NaN


def test_growing_magnitudes_are_foretold_before_they_overflow():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale * 2.0 ** (self.step / 4)

    model = nn.Sequential(nn.Linear(8, 8), Growing())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Tracer(model, level="watch") as tracer:
        for step in range(33):
            model[1].step = step
            model.half() if step == 0 else None
            model(torch.ones(2, 8, dtype=torch.float16)).float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = tracer.diagnosis
    assert (found.verdict, found.phase, found.module) == ("warning", "forward", "1")
    at_warning, predicted = found.step, found.evidence["steps_left"]
    growth = math.log2(65504 / found.evidence["absmax"]) * 4
    assert abs(predicted - growth) <= 2
    assert "`1` will pass 65504 in about" in found.sentence
    assert at_warning < 33


def test_the_trend_asks_for_steady_growth():
    assert steps_left([2.0**n for n in range(16)], 2.0**25) == 10
    assert steps_left([1.0] * 16, 65504) is None
    assert steps_left([4.0, 1.0] * 8, 65504) is None
    assert steps_left([2.0**-n for n in range(16)], 65504) is None
    assert steps_left([1.0] * 15 + [math.inf], 65504) is None


@pytest.mark.parametrize("bad_step", [None, 6])
def test_training_is_bit_identical(bad_step):
    def run(traced):
        model = network()
        torch.manual_seed(1)
        scale = lambda step: 1e30 if step == bad_step else 1.0  # noqa: E731
        optimizer = lambda p: torch.optim.Adam(p, 1e-3)  # noqa: E731
        if traced:
            with Tracer(model, level="watch"):
                losses = train(model, 12, lambda step: torch.randn(16, 8) * scale(step), optimizer)
        else:
            losses = train(model, 12, lambda step: torch.randn(16, 8) * scale(step), optimizer)
        return [*losses, *model.state_dict().values(), torch.get_rng_state()]

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_a_container_is_noted_once_with_its_last_child_and_every_other_module_by_itself():
    class Doubling(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Sequential(Doubling(), Doubling()), Doubling())
    with Tracer(model, level="watch") as tracer, torch.no_grad():
        for _ in range(5):
            model(torch.ones(2, 2))
    assert tracer._watching.watch.rows[-1].outputs == {"0.0": 2.0, "0.1": 4.0, "1": 8.0}


def test_scale_calibration_is_no_failure():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    with Tracer(model, level="watch") as tracer:
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(2, 4) * 1e3).pow(2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert tracer.diagnosis.verdict == "healthy"


def test_no_hook_is_left_behind():
    def hooks():
        return (
            len(torch_module._global_forward_hooks),
            len(torch_module._global_forward_pre_hooks),
            len(torch_optimizer._global_optimizer_pre_hooks),
            len(torch_optimizer._global_optimizer_post_hooks),
            torch.autograd._engine_run_backward,
        )

    before = hooks()
    model = nn.Linear(8, 1)
    with pytest.raises(RuntimeError, match="shapes"), Tracer(model, level="watch") as tracer:
        train(model, 2, lambda step: torch.ones(4, 8 - step * 5), loss_of=lambda output: torch.log(output * 0).sum())
    assert hooks() == before
    assert tracer.diagnosis.verdict == "failure"


def test_the_report_and_the_json_are_written(tmp_path):
    model = network()
    with Tracer(model, level="watch") as tracer:
        train(model, 3)
    assert tracer.report(tmp_path / "report.html").stat().st_size > 1000
    assert '"verdict": "healthy"' in tracer.write_json(tmp_path / "d.json").read_text()
