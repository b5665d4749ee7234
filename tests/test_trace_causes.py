"""The textbook failures: op, phase, step, module, cause, node and line of each, as established by running it."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlpkit
from mlpkit.trace import Tracer

INF, NAN = math.inf, math.nan


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, 1)

    def forward(self, x):
        h = self.fc1(x)  # mark: fc1
        return self.fc2(self.norm(h))


def train(model, optimizer, loss_of, steps):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()  # mark: update


def fp16_overflow_into_layernorm():
    model = Net().half()
    with torch.no_grad():
        model.fc1.weight.fill_(30.0)
    batches = [torch.ones(4, 64).half() * factor for factor in (1, 60, 1)]
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), lambda m, i: m(batches[i]).float().pow(2).mean(), 3)


def log_of_zero():
    layer = nn.Linear(4, 1)
    layer(torch.log(torch.tensor([1.0, 0.0, 2.0, 3.0]))).sum().backward()  # mark: log_of_zero


def zero_over_zero():
    w = torch.ones(4, requires_grad=True)
    x = w * torch.zeros(4)
    y = x / x.norm()  # mark: zero_over_zero
    y.sum().backward()


def learning_rate_too_high():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    train(model, torch.optim.SGD(model.parameters(), lr=50.0), lambda m, _: F.mse_loss(m(x), y), 8)


def sqrt_of_zero_in_backward():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.bias)
    x = torch.zeros(2, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer, lambda m, _: torch.sqrt(m(x).pow(2).sum()), 2)  # mark: sqrt_of_zero_in_backward


def softmax_by_hand():
    layer = nn.Linear(4, 4)
    z = layer(torch.full((3, 4), 500.0)) + 500.0
    e = torch.exp(z)  # mark: softmax_by_hand
    (e / e.sum(-1, keepdim=True))[:, 0].mean().backward()


def nan_in_the_input():
    x = torch.from_numpy(np.array([[1.0, 2.0, NAN, 4.0]], dtype=np.float32))
    nn.Linear(4, 4)(x).sum().backward()  # mark: nan_in_the_input


def nan_in_a_parameter():
    MODELS["nan"](torch.ones(2, 8)).sum().backward()


def input_cast_overflows():
    layer = nn.Linear(4, 2).half()
    x = torch.full((2, 4), 1e5)
    layer(x.half()).sum().backward()  # mark: input_cast_overflows


def parameter_cast_overflows():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(1e6)
    model.half()  # mark: parameter_cast_overflows
    model(torch.ones(1, 4).half()).sum().backward()


def autocast_overflows():
    model = Net(8)
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.full((2, 8), 1e5)).float().mean()
    loss.backward()


def eps_underflows_in_fp16():
    layer = nn.Linear(4, 4).half()
    nn.init.zeros_(layer.bias)
    h = layer(torch.zeros(2, 4).half())
    scale = h.abs().mean() + 1e-8  # mark: eps_underflows_in_fp16
    (h / scale).float().sum().backward()


def log_of_an_underflowed_softmax():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[200.0, 0.0], [0.0, 0.0]]))
    p = torch.softmax(layer(torch.ones(1, 2)), -1)  # mark: log_of_an_underflowed_softmax
    (-torch.log(p)[:, 1]).mean().backward()


def infinite_learning_rate():
    model = nn.Linear(4, 2)
    train(model, torch.optim.SGD(model.parameters(), lr=INF), lambda m, _: m(torch.ones(3, 4)).sum(), 2)


def nan_learning_rate_foreach():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)

    def loss_of(m, step):
        if step == 1:
            optimizer.param_groups[0]["lr"] = NAN
        return m(torch.ones(3, 4)).sum()

    train(model, optimizer, loss_of, 3)


def huge_learning_rate_overflows_the_update():
    model = nn.Linear(4, 2)
    loss = lambda m, _: 100 * m(torch.ones(3, 4)).sum()  # noqa: E731
    train(model, torch.optim.SGD(model.parameters(), lr=1e38), loss, 1)


def adam_without_eps_on_a_zero_gradient():
    model = nn.Linear(4, 2)
    train(model, torch.optim.Adam(model.parameters(), eps=0.0), lambda m, _: m(torch.zeros(3, 4)).sum(), 1)


def squared_gradient_overflows_in_fused_adam():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    train(model, optimizer, lambda m, _: 1e25 * m(torch.ones(3, 4)).sum(), 1)


def hand_written_update():
    w = torch.ones(3, requires_grad=True)
    for lr in (0.1, INF):
        (w * torch.ones(3)).sum().backward()
        with torch.no_grad():
            w -= w.grad * lr  # mark: hand_written_update
            w.grad.zero_()


def fully_masked_row():
    scores = nn.Linear(4, 4)(torch.randn(4, 4))
    scores = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool), -INF)
    torch.softmax(scores, -1).sum().backward()  # mark: fully_masked_row


def sqrt_of_a_negative():
    layer = nn.Linear(2, 1)
    variance = torch.tensor([1.0, -1e-9])
    layer(torch.sqrt(variance)).sum().backward()  # mark: sqrt_of_a_negative


def mean_of_nothing():
    w = torch.ones(3, requires_grad=True)
    picked = w[torch.zeros(3, dtype=torch.bool)]
    (w.sum() + picked.mean()).backward()  # mark: mean_of_nothing


def every_target_ignored():
    logits = nn.Linear(4, 3)(torch.randn(2, 4))
    F.cross_entropy(logits, torch.full((2,), -100)).backward()  # mark: every_target_ignored


def acos_outside_its_domain():
    w = torch.ones(2, requires_grad=True)
    torch.acos(w * 1.5).sum().backward()  # mark: acos_outside_its_domain


def activations_explode_over_layers():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)))
    for layer in model:
        nn.init.constant_(layer.weight, 500.0)
    model(torch.ones(2, 8)).sum().backward()


def fused_layer_overflows_in_fp16():
    model = mlpkit.nn.FusedLinear(64, 8, activation="relu").half()
    with torch.no_grad():
        model.weight.fill_(100.0)
    nn.Sequential(model, nn.Linear(8, 1).half())(torch.full((2, 64), 100.0).half()).sum().backward()


def a_model_without_training_returns_nan():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
        return model(torch.full((2, 4), 10.0))


def a_value_that_is_only_printed():
    return torch.log(torch.zeros(1)).item()  # mark: a_value_that_is_only_printed


def negative_running_variance():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].running_var.fill_(-1.0)
    model.eval()(torch.ones(3, 2)).sum().backward()


def layernorm_without_eps():
    nn.Sequential(nn.LayerNorm(4, eps=0.0))(torch.ones(2, 4)).sum().backward()


def one_update_blows_up():
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 1))
    x = torch.randn(8, 4)
    train(model, torch.optim.RMSprop(model.parameters(), lr=1e15), lambda m, _: m(x).pow(2).mean(), 3)


def one_bad_batch():
    model = nn.Linear(4, 1)
    batches = [torch.randn(4, 4) * (1e25 if i == 20 else 1.0) for i in range(22)]
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), lambda m, i: m(batches[i]).pow(2).mean(), 22)


def attention_scores_overflow_in_fp16():
    q = nn.Linear(32, 32).half()
    x = q(torch.randn(2, 4, 32).half()) * 1000
    scores = x @ x.transpose(1, 2)  # mark: attention_scores_overflow_in_fp16
    torch.softmax(scores, -1).float().sum().backward()


def mask_times_infinity():
    w = torch.ones(3, requires_grad=True)
    x = torch.tensor([1.0, 0.0, 2.0])
    (torch.log(x * w) * (x > 0)).sum().backward()  # mark: mask_times_infinity


def soft_target_of_a_masked_class():
    z = nn.Linear(3, 3)(torch.ones(1, 3)).masked_fill(torch.tensor([[True, False, False]]), -INF)
    target = torch.tensor([[0.0, 1.0, 0.0]])
    (-(target * F.log_softmax(z, -1)).sum()).backward()  # mark: soft_target_of_a_masked_class


def where_does_not_stop_the_gradient():
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    optimizer = torch.optim.SGD([x], 0.1)
    y = torch.sqrt(x)  # mark: where_does_not_stop_the_gradient
    torch.where(x > 0, y, 0.0).sum().backward()
    optimizer.step()


def gradients_explode_over_time():
    w = (torch.eye(8) * 30).requires_grad_()
    h = torch.full((1, 8), 1e-30)
    for _ in range(30):
        h = h @ w
    h.sum().backward(torch.tensor(1e10))


def adam_eps_underflows_in_fp16():
    model = nn.Linear(4, 4).half()
    loss = lambda m, _: (m(torch.zeros(1, 4).half()).float() * 1e-6).sum()  # noqa: E731
    train(model, torch.optim.Adam(model.parameters()), loss, 1)


def own_autograd_function():
    class Divide(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1  # mark: own_autograd_function

        @staticmethod
        def backward(ctx, gradient):
            return gradient / ctx.saved_tensors[0]

    class Layer(nn.Module):
        def forward(self, x):
            return Divide.apply(x)

    x = torch.zeros(3, requires_grad=True)
    nn.Sequential(Layer())(x).sum().backward()


def batchnorm_statistics():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    model(torch.full((3, 4), 1e30) * torch.randn(3, 4)).sum().backward()


def broken_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with torch.no_grad():
        model[1].weight[3] = NAN
    return model


MODELS = {"nan": broken_model()}

# case: op, phase, step, module, cause, dtype, node
CASES = {
    fp16_overflow_into_layernorm: ("addmm", "forward", 1, "fc1", "overflow", "float16", None),
    log_of_zero: ("log", "forward", 0, "", "log_of_zero", "float32", None),
    zero_over_zero: ("div", "forward", 0, "", "zero_over_zero", "float32", None),
    learning_rate_too_high: ("addmm", "forward", 3, "2", "hyperparameter", "float32", None),
    sqrt_of_zero_in_backward: ("div", "backward", 0, "", "division_by_zero", "float32", "SqrtBackward0"),
    softmax_by_hand: ("exp", "forward", 0, "", "overflow", "float32", None),
    nan_in_the_input: ("input", "source", 0, "", "external", "float32", None),
    nan_in_a_parameter: ("param", "source", 0, "1", "external", "float32", None),
    input_cast_overflows: ("_to_copy", "source", 0, "", "cast_overflow", "float16", None),
    parameter_cast_overflows: ("_to_copy", "source", 0, "", "cast_overflow", "float16", None),
    autocast_overflows: ("_to_copy", "forward", 0, "fc1", "cast_overflow", "float16", None),
    eps_underflows_in_fp16: ("add", "forward", 0, "", "underflow", "float16", None),
    log_of_an_underflowed_softmax: ("_softmax", "forward", 0, "", "underflow", "float32", None),
    infinite_learning_rate: ("add_", "optimizer", 0, "", "hyperparameter", "float32", None),
    nan_learning_rate_foreach: ("_foreach_add_", "optimizer", 1, "", "hyperparameter", "float32", None),
    huge_learning_rate_overflows_the_update: ("add_", "optimizer", 0, "", "hyperparameter", "float32", None),
    adam_without_eps_on_a_zero_gradient: ("addcdiv_", "optimizer", 0, "", "zero_over_zero", "float32", None),
    squared_gradient_overflows_in_fused_adam: ("_fused_adam_", "optimizer", 0, "", "overflow", "float32", None),
    hand_written_update: ("mul", "optimizer", 1, "", "hyperparameter", "float32", None),
    fully_masked_row: ("_softmax", "forward", 0, "", "inf_minus_inf", "float32", None),
    sqrt_of_a_negative: ("sqrt", "forward", 0, "", "sqrt_of_negative", "float32", None),
    mean_of_nothing: ("mean", "forward", 0, "", "empty_reduction", "float32", None),
    every_target_ignored: ("nll_loss_forward", "forward", 0, "", "empty_reduction", "float32", None),
    acos_outside_its_domain: ("acos", "forward", 0, "", "domain", "float32", None),
    activations_explode_over_layers: ("mm", "forward", 0, "10", "explosion", "float32", None),
    fused_layer_overflows_in_fp16: ("linear_act_dropout", "forward", 0, "0", "overflow", "float16", None),
    a_model_without_training_returns_nan: ("addmm", "forward", 0, "0", "overflow", "float32", None),
    a_value_that_is_only_printed: ("log", "forward", 0, "", "log_of_zero", "float32", None),
    negative_running_variance: ("native_batch_norm", "forward", 0, "0", "sqrt_of_negative", "float32", None),
    layernorm_without_eps: ("native_layer_norm", "forward", 0, "0", "zero_over_zero", "float32", None),
    one_update_blows_up: ("pow", "forward", 1, "", "hyperparameter", "float32", None),
    one_bad_batch: ("pow", "forward", 20, "", "overflow", "float32", None),
    attention_scores_overflow_in_fp16: ("bmm", "forward", 0, "", "overflow", "float16", None),
    mask_times_infinity: ("log", "forward", 0, "", "log_of_zero", "float32", None),
    soft_target_of_a_masked_class: ("mul", "forward", 0, "", "zero_times_inf", "float32", None),
    where_does_not_stop_the_gradient: ("div", "backward", 0, "", "zero_over_zero", "float32", "SqrtBackward0"),
    gradients_explode_over_time: ("mm", "backward", 0, "", "explosion", "float32", "MmBackward0"),
    adam_eps_underflows_in_fp16: ("add_", "optimizer", 0, "", "underflow", "float16", None),
    own_autograd_function: ("div", "backward", 0, "0", "division_by_zero", "float32", "DivideBackward"),
    batchnorm_statistics: ("native_batch_norm", "forward", 0, "0", "overflow", "float32", None),
}
MARKS = {
    fp16_overflow_into_layernorm: "fc1",
    autocast_overflows: "fc1",
    infinite_learning_rate: "update",
    nan_learning_rate_foreach: "update",
    adam_without_eps_on_a_zero_gradient: "update",
}
with open(__file__, encoding="utf-8") as _source:
    LINES = {line.split("# mark: ")[1].strip(): i for i, line in enumerate(_source, 1) if "# mark: " in line}


def trace(program, model=None):
    with Tracer(model) as tracer:
        program()
    return tracer


@pytest.mark.parametrize("program", CASES, ids=lambda program: program.__name__)
def test_the_root_is_named_exactly(program):
    found = trace(program).diagnosis
    expected = CASES[program]
    assert found.verdict == "failure", found.sentence
    answer = (found.op, found.phase, found.step, found.module, found.cause, found.dtype, found.node)
    assert answer == expected, found.sentence
    mark = MARKS.get(program, program.__name__)
    if mark in LINES:
        assert found.location.endswith(f"test_trace_causes.py:{LINES[mark]}")


def stages(found):
    return [(link["stage"], link["op"]) for link in found.chain]


def test_an_overflow_turns_to_nan_in_the_norm_and_stays_in_the_parameters():
    found = trace(fp16_overflow_into_layernorm).diagnosis
    assert stages(found) == [
        ("saturation", "addmm"),
        ("invalidation", "native_layer_norm"),
        ("contamination", "addmm"),
        ("contamination", "_to_copy"),
        ("persistence", "add_"),
    ]
    assert found.chain[1]["cause"] == "inf_minus_inf"
    assert found.chain[1]["module"] == "norm"
    assert found.chain[-1]["detail"] == "parameter `fc1.weight` and 5 more written"
    assert found.sentence.startswith("Step 1, forward of `fc1` (")
    assert found.sentence.endswith("addmm in float16 gave Inf; exact result 1.15e5 > 65504 (overflow).")
    # 64 products of 60 and 30, and a small bias.
    assert found.evidence["exact"] == pytest.approx(64 * 60 * 30, rel=1e-3)
    assert found.evidence["limit"] == 65504.0
    assert [step for step, _ in found.evidence["absmax_history"]] == [0]
    assert found.evidence["operands"]["left"] == 60.0
    assert [fix["verified"] for fix in found.fix] == [None] * len(found.fix)
    assert found.fix[0]["kind"] == "upcast"


def test_a_learning_rate_too_high_is_an_explosion_that_ends_in_an_overflow():
    found = trace(learning_rate_too_high).diagnosis
    first, second = found.chain[:2]
    assert (first["stage"], first["phase"], first["cause"]) == ("explosion", "optimizer", "hyperparameter")
    assert first["step"] < second["step"] == 3
    assert (second["stage"], second["cause"]) == ("saturation", "overflow")
    assert found.fix[0]["kind"] == "lower_lr"


def test_zero_times_inf_in_backward_is_the_second_link():
    found = trace(sqrt_of_zero_in_backward).diagnosis
    assert stages(found)[:2] == [("saturation", "div"), ("invalidation", "mul")]
    assert found.chain[1]["cause"] == "zero_times_inf"
    assert found.chain[-1]["stage"] == "persistence"


def test_an_underflow_names_the_rounded_operation_first_and_then_the_division():
    found = trace(eps_underflows_in_fp16).diagnosis
    assert stages(found) == [("saturation", "add"), ("invalidation", "div")]
    assert found.evidence["exact"] == pytest.approx(1e-8)
    assert "exact result 1e-8 was rounded to 0 (underflow), then div gave NaN: 0 / 0" in found.sentence


def test_a_bad_parameter_is_named():
    found = trace(nan_in_a_parameter).diagnosis
    assert "param `1.weight` held 1 NaN and 0 Inf of 8 elements (external)." in found.sentence
    assert found.evidence["index"] == [3]


def test_a_given_model_names_its_modules_below_a_wrapper():
    inner = Net().half()
    with torch.no_grad():
        inner.fc1.weight.fill_(3000.0)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = inner

        def forward(self, x):
            return self.body(x)

    wrapper = Wrapper()
    run = lambda: wrapper(torch.ones(1, 64).half()).sum().backward()  # noqa: E731
    assert trace(run).diagnosis.module == "body.fc1"
    assert trace(run, model=wrapper).diagnosis.module == "body.fc1"


def test_a_backward_operation_is_mapped_to_the_forward_line_and_module():
    class Root(nn.Module):
        def forward(self, x):
            return torch.sqrt(x)  # mark: root_forward

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Root())

        def forward(self, x):
            return self.inner(x)

    w = torch.zeros(2, requires_grad=True)

    def program():
        loss = Model()(w).sum()
        loss.backward()

    found = trace(program).diagnosis
    assert (found.phase, found.module, found.node) == ("backward", "inner.0", "SqrtBackward0")
    assert found.location.endswith(f":{LINES['root_forward']}")


def test_the_first_failure_is_the_diagnosis_and_all_are_listed():
    def program():
        w = torch.ones(2, requires_grad=True)
        torch.log(w * 0).sum().backward()
        w = torch.ones(2, requires_grad=True)
        torch.sqrt(w - 2).sum().backward()

    found = trace(program)
    assert found.diagnosis.op == "log"
    assert [(one.op, one.verdict) for one in found.diagnoses if one.phase == "forward"] == [
        ("log", "failure"),
        ("sqrt", "failure"),
    ]
