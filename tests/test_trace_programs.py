"""Textbook failures as small programs; test_trace_causes.py knows what is wrong with each, and on which marked line."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import mlpkit

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


class Root(nn.Module):
    def forward(self, x):
        return torch.sqrt(x)  # mark: root_forward


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Root())

    def forward(self, x):
        return self.inner(x)


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


def squared_gradient_overflows():
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


with open(__file__, encoding="utf-8") as _source:
    LINES = {line.split("# mark: ")[1].strip(): i for i, line in enumerate(_source, 1) if "# mark: " in line}
