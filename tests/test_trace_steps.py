"""Which step it was: optimizer steps, scaler updates, guarded steps, and next_step() above them all."""

import math

import pytest
import torch
from torch import nn

import mlpkit
from mlpkit.guard import TrainStep
from mlpkit.trace import Tracer


def batch(bad):
    return torch.full((2, 4), 1e38 if bad else 1.0)


def square(model, bad):
    return model(batch(bad)).pow(2).mean()


def test_optimizer_steps_are_noticed():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Tracer() as tracer:
        for step in range(6):
            optimizer.zero_grad()
            loss = square(model, step == 4)
            loss.backward()
            optimizer.step()
            loss.item()
    assert (tracer.diagnosis.step, tracer.diagnosis.op, tracer.steps) == (4, "pow", 6)


def test_next_step_opens_step_zero_and_then_optimizer_steps_no_longer_count():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Tracer() as tracer:
        for step in range(3):
            tracer.next_step()
            for micro in range(4):
                optimizer.zero_grad()
                square(model, (step, micro) == (2, 1)).backward()
                optimizer.step()
    assert (tracer.diagnosis.step, tracer.steps) == (2, 3)


def test_accumulated_gradients_are_one_step():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Tracer() as tracer:
        for call in range(8):
            square(model, call == 5).backward()
            if call % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert (tracer.diagnosis.step, tracer.steps) == (2, 4)


def test_hand_written_updates_are_steps():
    w = torch.ones(4, requires_grad=True)
    with Tracer() as tracer:
        for step in range(5):
            (torch.log(w * (0.0 if step == 3 else 1.0))).sum().backward()
            with torch.no_grad():
                w -= 0.01 * w.grad
                w.grad = None
    assert (tracer.diagnosis.step, tracer.diagnosis.op, tracer.steps) == (3, "log", 5)


def test_two_optimizers_after_one_backward_are_one_step():
    first, second = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(first.parameters(), 1e-3), torch.optim.Adam(second.parameters())]
    with Tracer() as tracer:
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            second(first(batch(False))).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert tracer.steps == 3


def guarded(precision, bad_step, bad, model=None, **options):
    model = model or nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    step = TrainStep(model, "mse", torch.optim.Adam(model.parameters()), precision=precision, **options)
    with Tracer() as tracer:
        for index in range(5):
            x = torch.randn(4, 4)
            step(x * bad if index == bad_step else x, torch.randn(4, 1))
    return tracer, step


def test_a_skipped_step_is_said_in_the_report():
    tracer, step = guarded("fp16", 2, 1e6, init_scale=1024.0)
    found = tracer.diagnosis
    assert [record.step for record in step.records] == [2]
    assert (found.op, found.phase, found.step, found.module) == ("_to_copy", "forward", 2, "0")
    assert found.cause == "cast_overflow"
    assert found.sentence.endswith("Step skipped; 6 parameters were saved.")
    assert tracer.steps == 5
    assert [one.verdict for one in tracer.diagnoses] == ["failure"]


def test_a_nan_batch_under_the_guard_is_external_and_skipped():
    tracer, _ = guarded("fp32", 1, math.nan)
    found = tracer.diagnosis
    assert (found.step, found.verdict) == (1, "failure")
    assert found.sentence.endswith("Step skipped; 6 parameters were saved.")


def test_a_guarded_step_that_calibrates_its_scale_is_benign():
    tracer, step = guarded("fp16", -1, 1.0, init_scale=2.0**24)
    assert step.skipped > 0
    assert tracer.diagnosis.verdict == "healthy"
    assert {found.verdict for found in tracer.diagnoses} == {"benign"}
    assert "was being calibrated" in tracer.diagnoses[0].sentence


def test_the_fused_layers_are_named_as_one_operation():
    model = mlpkit.nn.MLP(4, [8], 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e20)
    tracer, _ = guarded("fp32", 0, 1e0, model=model)
    found = tracer.diagnosis
    assert (found.op, found.phase, found.step, found.cause) == ("linear_act_dropout", "forward", 0, "overflow")
    assert abs(found.evidence["exact"]) > found.evidence["limit"] == torch.finfo(torch.float32).max


def test_a_backward_overflow_of_the_fused_layer_is_mapped_to_its_module():
    model = nn.Sequential(mlpkit.nn.FusedLinear(4, 4, activation="relu"), mlpkit.nn.FusedLinear(4, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(1e30)
    with Tracer() as tracer:
        loss = model(torch.full((2, 4), 1e-30)).sum()
        loss.backward(torch.tensor(1e15))
    found = tracer.diagnosis
    assert (found.op, found.phase, found.module, found.cause) == ("linear_act_dropout", "backward", "1", "overflow")
    assert found.node


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_history_holds_the_unscaled_loss_of_a_guarded_step(loss, accumulate):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    step = TrainStep(model, loss, optimizer, precision="fp16", accumulate=accumulate, init_scale=1024.0)
    # cross_entropy's operation gives the rows' weight, 64, beside the loss.
    target = torch.full((64, 3), 3.0) if loss == "mse" else torch.zeros(64, dtype=torch.int64)
    results = []
    with Tracer() as tracer:
        for _ in range(2 * accumulate):
            results.append(step(torch.ones(64, 4), target).loss)
    assert not step.records
    losses = [value for _, value in tracer._observer.history.losses]
    assert losses == [max(results[:accumulate]), max(results[accumulate:])]


def test_the_history_holds_the_unscaled_loss_of_a_gradient_scaler():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    with Tracer() as tracer:
        for _ in range(3):
            optimizer.zero_grad()
            loss = square(model, False)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert [value for _, value in tracer._observer.history.losses] == losses


def test_a_loss_that_only_its_scale_overflows_is_calibration():
    def large(output, target):
        return output.float().mean() + 1e33

    model = nn.Linear(4, 1)
    step = TrainStep(model, large, torch.optim.SGD(model.parameters(), 1e-3), precision="fp16", init_scale=2.0**24)
    with Tracer() as tracer:
        step(torch.ones(2, 4), torch.ones(2, 1))
    assert step.records[0].where == "gradient"
    assert tracer.diagnosis.verdict == "healthy"
    assert {found.verdict for found in tracer.diagnoses} == {"benign"}
    assert (tracer.diagnoses[0].phase, tracer.diagnoses[0].op) == ("optimizer", "mul")


@pytest.mark.parametrize("held_back", [True, False])
def test_an_overflow_of_the_scale_is_no_calibration_once_it_is_in_a_parameter(held_back):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    with Tracer(model) as tracer:
        with torch.autocast("cpu", torch.float16):
            loss = model(batch(False)).mean()
        scaler.scale(loss.float()).backward()
        scaler.unscale_(optimizer)
        if held_back:
            scaler.step(optimizer)
        else:
            optimizer.step()
    assert tracer.diagnosis.verdict == ("healthy" if held_back else "failure")
    assert bool(torch.isfinite(model.weight).all()) == held_back
