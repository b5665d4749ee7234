"""Faults without a NaN in the end: nothing moves any more. Each gives by how much its parameters moved."""

import torch
from torch import nn

from corpus.case import ANY, Variant, build, fails, mlp, moved, train


def plain(v):
    return lambda m, _: v.reduce(m(v.data()))


@fails("_to_copy", "backward", 0, "underflow", dtype="float16", silent=True, root=True)
def gradients_vanish_in_half(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.Tanh(), nn.Linear(v.width, 2))

    def loss(m, _):
        with torch.autocast("cpu", torch.float16):
            y = m(v.data())
        return y.float().mean() * (v.pick(1e-9, 1e-8, 1e-10) if planted else 1.0)

    return moved(model, lambda: train(model, loss, 3))


@fails("add_", "optimizer", 0, "underflow", dtype="float16", silent=True, root=True)
def updates_round_away_in_half(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, 1, bias=False)).half()
    nn.init.constant_(next(model.parameters()), 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=v.pick(1e-5, 1e-6, 3e-6) if planted else 0.1, foreach=False)
    loss = lambda m, _: m(torch.ones(v.batch, v.width).half()).float().mean()  # noqa: E731
    return moved(model, lambda: train(model, loss, 4, optimizer))


@fails("_foreach_add_", "optimizer", 0, "underflow", dtype="bfloat16", silent=True, root=True)
def updates_round_away_in_bfloat16(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, 1, bias=False)).bfloat16()
    nn.init.constant_(next(model.parameters()), 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=v.pick(1e-4, 1e-5, 1e-4) if planted else 0.1, foreach=True)
    loss = lambda m, _: m(torch.ones(v.batch, v.width).bfloat16()).float().mean()  # noqa: E731
    return moved(model, lambda: train(model, loss, 4, optimizer))


@fails("relu", "forward", 0, "external", silent=True, root=True, module=lambda v: v.name("1"))
def every_unit_is_dead(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.ReLU(), nn.Linear(v.width, 1, bias=False))
    if planted:
        nn.init.constant_((model.body if v.nested else model)[0].bias, v.pick(-50.0, -100.0, -30.0))
    return moved(model, lambda: train(model, plain(v), 3))


@fails("relu", "forward", 1, "hyperparameter", silent=True, root=True, module=lambda v: v.name("1"))
def one_update_kills_every_unit(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.ReLU(), nn.Linear(v.width, 1))
    inner = model.body if v.nested else model
    nn.init.constant_(inner[2].weight, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=v.pick(1e3, 3e3, 1e3) if planted else 1e-3)
    x = torch.rand(v.batch, v.width)
    loss = lambda m, _: m(x).mean()  # noqa: E731
    train(model, loss, 1, optimizer)
    return moved(inner[0], lambda: train(model, loss, 3, optimizer))


@fails("sigmoid", "forward", 0, "underflow", silent=True, root=True)
def sigmoid_saturates(v: Variant, planted: bool):
    model = mlp(v, out=2)

    def loss(m, _):
        y = torch.sigmoid(m(v.data()) + (v.pick(60.0, 100.0, 40.0) if planted else 0.0))  # fault
        return v.reduce(y * 0.5)

    return moved(model, lambda: train(model, loss, 3))


@fails("tanh", "forward", 0, "underflow", dtype="float16", silent=True, root=True)
def tanh_saturates_in_half(v: Variant, planted: bool):
    model = mlp(v, out=2).half()

    def loss(m, _):
        y = torch.tanh(m(v.data().half()) * 0.1 + (v.pick(20.0, 9.0, 50.0) if planted else 0.0))  # fault
        return v.reduce(y * 0.5)

    return moved(model, lambda: train(model, loss, 3, torch.optim.SGD(model.parameters(), lr=0.5)))


@fails("_softmax", "forward", 0, "underflow", silent=True, root=True)
def attention_saturates(v: Variant, planted: bool):
    model = mlp(v, out=4)
    values = torch.arange(4).float()

    def loss(m, _):
        scores = m(v.data()) + values * (v.pick(500.0, 300.0, 1e4) if planted else 0.1)
        return v.reduce((torch.softmax(scores, -1) * values).sum(-1))  # fault

    return moved(model, lambda: train(model, loss, 3))


@fails("addcmul_", "optimizer", 0, "overflow", silent=True)
def second_moment_overflows(v: Variant, planted: bool):
    model = mlp(v)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
    factor = v.pick(1e25, 1e26, 1e24) if planted else 1.0

    def loss(m, _):
        return sum((p * torch.ones_like(p)).sum() for p in m.parameters()) * factor

    return moved(model, lambda: train(model, loss, 3, optimizer))


@fails("_foreach_norm", "optimizer", 0, "overflow", silent=True)
def gradient_norm_overflows(v: Variant, planted: bool):
    model = mlp(v)
    factor = v.pick(1e22, 1e25, 1e24) if planted else 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def run():
        for _ in range(3):
            optimizer.zero_grad()
            (sum(p.sum() for p in model.parameters()) * factor).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # fault
            optimizer.step()

    return moved(model, run)


@fails("pow", "forward", 0, "overflow", dtype="float16", silent=True, module=lambda v: v.name("1"))
def rms_norm_by_hand_overflows(v: Variant, planted: bool):
    class Rms(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)  # fault

    model = build(v, nn.Linear(v.width, v.width), Rms(), nn.Linear(v.width, 2, bias=False)).half()
    x = torch.full((v.batch, v.width), 1.0).half()
    nn.init.constant_((model.body if v.nested else model)[0].bias, v.pick(300.0, 500.0, 1e3) if planted else 1.0)
    return moved(model, lambda: train(model, lambda m, _: v.reduce(m(x)), 3))


@fails("log", "forward", 0, "log_of_zero", silent=True)
def nan_to_num_hides_every_gradient(v: Variant, planted: bool):
    model = mlp(v, out=2)

    def run():
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            y = torch.relu(m := model(v.data())) * (0.0 if planted else 1.0) + (0.0 if planted else 1e-2)
            (torch.log(y).mean() + m.mean() * 0).backward()  # fault
            for p in model.parameters():
                p.grad = torch.nan_to_num(p.grad, 0.0, 0.0, 0.0)
            optimizer.step()

    return moved(model, run)


@fails("exp", "forward", 0, "overflow", silent=True)
def distance_kernel_by_division(v: Variant, planted: bool):
    model = mlp(v, out=2)

    def loss(m, _):
        z = (m(v.data()).detach() + (v.pick(100.0, 95.0, 300.0) if planted else 0.0)).exp()  # fault
        return v.reduce((m(v.data()) / z).sum(-1))

    return moved(model, lambda: train(model, loss, 3))


@fails("mm", "forward", 0, "underflow", silent=True, root=True, module=ANY)
def gradients_vanish_over_depth(v: Variant, planted: bool):
    layers = [nn.Linear(v.width, v.width, bias=False) for _ in range(12)]
    for layer in layers:
        nn.init.constant_(layer.weight, v.pick(1e-5, 1e-6, 1e-7) / v.width if planted else 1.0 / v.width)
    model = build(v, *layers)
    return moved(model, lambda: train(model, lambda m, _: m(torch.ones(v.batch, v.width)).sum() + 1, 3))


@fails("clamp", "forward", 0, "external", silent=True, root=True)
def clamp_stops_every_gradient(v: Variant, planted: bool):
    model = mlp(v, out=2)

    def loss(m, _):
        return v.reduce((m(v.data()) + (v.pick(30.0, 20.0, 90.0) if planted else 0.0)).clamp(-9.0, 9.0))  # fault

    return moved(model, lambda: train(model, loss, 3))
