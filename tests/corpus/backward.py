"""Faults born in the backward pass, with a loss that is finite."""

import torch
from torch import nn

from corpus.case import Variant, build, fails, mlp, train


def two(model, loss_of, **options):
    return train(model, lambda m, _: loss_of(m), 2, **options)


@fails("div", "backward", 0, "division_by_zero")
def root_of_zero(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.Tanh(), nn.Linear(v.width, 2))
    for layer in (model.body if v.nested else model)[::2]:
        nn.init.zeros_(layer.bias)
    floor = 0.0 if planted else 1e-3

    def loss(m):
        y = m(torch.zeros(v.batch, v.width) if planted else v.data())
        return v.reduce(torch.sqrt(y.pow(2).sum() + floor))  # fault

    return two(model, loss)


@fails("div", "backward", 0, "zero_over_zero")
def where_after_the_root(v: Variant, planted: bool):
    model = mlp(v, out=3)

    def loss(m):
        y = (m(v.data()) * (torch.arange(3) > 0)).abs() + (0.0 if planted else 0.1)
        return v.reduce(torch.where(y > 0, torch.sqrt(y), 0.0))  # fault

    return two(model, loss)


@fails("pow", "backward", 0, "division_by_zero")
def focal_power_at_zero(v: Variant, planted: bool):
    model = mlp(v, out=1)

    def loss(m):
        p = torch.sigmoid(m(v.data()) + (v.pick(60.0, 40.0, 50.0) if planted else 0.0))
        return v.reduce((1 - p) ** 0.5)  # fault

    return two(model, loss)


@fails("rsqrt", "backward", 0, "division_by_zero")
def arc_cosine_at_one(v: Variant, planted: bool):
    model = mlp(v, out=3)

    def loss(m):
        y = torch.tanh(m(v.data()) * 0.1 + (30.0 if planted else 0.0))
        return v.reduce(torch.acos(y))  # fault

    return two(model, loss)


@fails("div", "backward", 0, "overflow")
def logarithm_of_a_subnormal(v: Variant, planted: bool):
    model = mlp(v, out=2)

    def loss(m):
        p = torch.sigmoid(m(v.data())) * (v.pick(1e-41, 1e-40, 3e-42) if planted else 1.0)
        return (torch.log(p) * 1e3).mean()  # fault

    return two(model, loss)


@fails("mm", "backward", 0, "overflow", dtype="float16", module=lambda v: v.name("1"))
def gradient_overflows_in_half(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.Linear(v.width, 1)).half()
    nn.init.constant_((model.body if v.nested else model)[1].weight, 1.0)

    def loss(m):
        x = torch.full((v.batch, v.width), 100.0 if planted else 1.0).half()
        return m(x * 1.0).float().sum() * (v.pick(3e3, 2e3, 5e3) if planted else 1.0)

    return two(model, loss)


@fails("mm", "backward", 0, "explosion", root=True)
def gradient_explodes_over_time(v: Variant, planted: bool):
    w = nn.Parameter(torch.eye(v.width) * (v.pick(40.0, 60.0, 100.0) if planted else 0.9))
    h0 = torch.full((v.batch, v.width), 1e-36 if planted else 1.0)

    def loop():
        h = h0
        for _ in range(22):
            h = h @ w  # fault
        return h.sum() * (1e12 if planted else 1.0)

    if planted:
        h0 = torch.full((v.batch, v.width), v.pick(1e-36, 1e-38, 1e-42))
    return train(nn.ParameterList([w]), lambda m, _: loop(), 2, torch.optim.SGD([w], lr=1e-3))


@fails("_to_copy", "backward", 0, "cast_overflow", dtype="float16")
def autocast_gradient_does_not_fit(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.Tanh(), nn.Linear(v.width, 2))

    def loss(m):
        with torch.autocast("cpu", torch.float16):
            y = m(v.data())
        return y.float().sum() * (v.pick(1e5, 1e6, 7e4) if planted else 1.0)  # fault

    return two(model, loss)


class Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / x


class RatioLayer(nn.Module):
    def forward(self, x):
        return Ratio.apply(x)


@fails("div", "backward", 0, "division_by_zero", module=lambda v: v.name("2"))
def own_function_divides_by_zero(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.Hardtanh() if planted else nn.Sigmoid(), RatioLayer())
    nn.init.constant_((model.body if v.nested else model)[0].weight, 0.0 if planted else 0.1)
    nn.init.constant_((model.body if v.nested else model)[0].bias, 0.0 if planted else 0.1)

    def loss(m):
        return m(v.data()).sum()

    return two(model, loss)


@fails("div", "backward", 1, "division_by_zero")
def distance_to_itself(v: Variant, planted: bool):
    model = mlp(v, out=3)
    x = v.data()

    def loss(m, step):
        a = m(x)
        b = a.detach() if planted and step == 1 else torch.zeros_like(a)
        return v.reduce(((a - b).pow(2).sum(-1)).sqrt())  # fault

    return train(model, loss, 2)
