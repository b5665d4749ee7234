"""Faults of the update: learning rates, eps, moments, weight decay, scales; and explosions over steps."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from corpus.case import ANY, Variant, fails, mlp, train

INF, NAN = math.inf, math.nan


def plain(v):
    return lambda m, _: v.reduce(m(v.data()))


@fails("add_", "optimizer", 0, "hyperparameter")
def infinite_learning_rate(v: Variant, planted: bool):
    model = mlp(v)
    rate = INF if planted else 1e-3
    return train(model, plain(v), 2, torch.optim.SGD(model.parameters(), lr=rate, foreach=False))


@fails("_foreach_addcdiv_", "optimizer", 1, "hyperparameter")
def learning_rate_becomes_nan(v: Variant, planted: bool):
    model = mlp(v)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)

    def loss(m, step):
        optimizer.param_groups[0]["lr"] = NAN if planted and step == 1 else 1e-3
        return v.reduce(m(v.data()))

    return train(model, loss, 3, optimizer)


@fails("", "forward", None, "hyperparameter", root=True, module=ANY)
def learning_rate_too_high(v: Variant, planted: bool):
    model = mlp(v, activation=nn.ReLU)
    x, y = v.data(16, v.width), v.data(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=v.pick(80.0, 40.0, 60.0) if planted else 1e-3)
    return train(model, lambda m, _: F.mse_loss(m(x), y), 14, optimizer)


@fails("", "forward", None, "hyperparameter", root=True, module=ANY)
def linear_regression_diverges(v: Variant, planted: bool):
    model = nn.Linear(v.width, 1)
    x = v.data(32, v.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=v.pick(30.0, 50.0, 20.0) if planted else 1e-3)
    return train(model, lambda m, _: (m(x) - 1).pow(2).mean(), 60, optimizer)


@fails("addcdiv_", "optimizer", 0, "zero_over_zero")
def adam_without_eps(v: Variant, planted: bool):
    model = mlp(v)
    x = v.data()
    x[:, 1] = 0
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0 if planted else 1e-8, foreach=False)
    return train(model, lambda m, _: v.reduce(m(x)), 2, optimizer)


@fails("add_", "optimizer", 0, "underflow", dtype="float16", root=True, born="addcdiv_")
def adam_eps_vanishes_in_half(v: Variant, planted: bool):
    model = mlp(v).half()
    x = v.data().half()
    x[:, 1] = 0
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-8 if planted else 1e-3, foreach=False)
    return train(model, lambda m, _: v.reduce(m(x)), 2, optimizer)


@fails("", "forward", None, "hyperparameter", root=True, module=ANY)
def weight_decay_too_high(v: Variant, planted: bool):
    model = mlp(v, activation=nn.ReLU)
    decay = v.pick(4000.0, 9000.0, 3000.0) if planted else 1e-2
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=decay)
    return train(model, plain(v), 40, optimizer)


@fails("", "forward", None, "hyperparameter", root=True, module=ANY)
def momentum_above_one(v: Variant, planted: bool):
    model = mlp(v, activation=nn.ReLU)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05 if planted else 1e-3, momentum=v.pick(6.0, 9.0, 5.0) if planted else 0.9
    )
    return train(model, plain(v), 80, optimizer)


@fails("mul", "optimizer", 1, "hyperparameter")
def own_update_with_an_infinite_rate(v: Variant, planted: bool):
    model = mlp(v)
    for step in range(3):
        model.zero_grad()
        v.reduce(model(v.data())).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad * (INF if planted and step == 1 else 1e-3)  # fault
    return [p.detach() for p in model.parameters()]


@fails("add_", "optimizer", 0, "hyperparameter", root=True)
def update_leaves_the_range(v: Variant, planted: bool):
    model = mlp(v)
    rate = v.pick(3e38, 1e38, 2e38) if planted else 1e-3
    loss = lambda m, _: 1e3 * m(v.data()).sum()  # noqa: E731
    return train(model, loss, 1, torch.optim.SGD(model.parameters(), lr=rate, foreach=False))


@fails("_to_copy", "optimizer", 0, "cast_overflow")
def loss_scale_too_small_to_invert(v: Variant, planted: bool):
    model = mlp(v)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=v.pick(1e-40, 1e-41, 2e-40) if planted else 128.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(v.reduce(model(v.data()))).backward()
        scaler.step(optimizer)  # fault
        scaler.update()
    return [p.detach() for p in model.parameters()]


@fails("pow", "forward", None, "overflow")
def one_bad_batch(v: Variant, planted: bool):
    model = nn.Sequential(nn.Linear(v.width, 1))
    bad = v.pick(9, 4, 6)
    factors = [1e25 if planted and i == bad else 1.0 for i in range(12)]
    return train(model, lambda m, i: (m(v.data() * factors[i]) - 1).pow(2).mean(), 12)  # fault


@fails("exp", "forward", None, "hyperparameter", root=True)
def policy_ratio_explodes(v: Variant, planted: bool):
    model = mlp(v, out=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=v.pick(50.0, 80.0, 90.0) if planted else 1e-3)
    x = v.data(16, v.width)
    return train(model, lambda m, _: torch.exp(m(x) - 0.5).mean() - 2 * m(x).mean(), 30, optimizer)  # fault


@fails("_foreach_add", "optimizer", 0, "hyperparameter")
def weight_decay_is_nan(v: Variant, planted: bool):
    model = mlp(v)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, foreach=True)
    if planted:
        optimizer.param_groups[0]["weight_decay"] = NAN
    return train(model, plain(v), 2, optimizer)
