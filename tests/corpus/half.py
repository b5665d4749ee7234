"""Faults of float16 and bfloat16: overflow, casts, eps that rounds to zero, underflow; autocast and plain."""

import torch
from torch import nn
from torch.nn import functional as F

from corpus.case import Variant, build, fails, mlp, moved, train


def two(model, loss_of, **options):
    return train(model, lambda m, _: loss_of(m), 2, **options)


@fails("addmm", "forward", 1, "overflow", module=lambda v: v.name("0"), dtype="float16")
def linear_overflows(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.LayerNorm(v.width), nn.Linear(v.width, 1)).half()
    nn.init.constant_(model.body[0].weight if v.nested else model[0].weight, 40.0)
    factors = (1.0, 3e3 if planted else 1.0, 1.0)
    return train(model, lambda m, i: v.reduce(m(torch.ones(v.batch, v.width).half() * factors[i])))


@fails("bmm", "forward", 0, "overflow", dtype="float16")
def attention_scores_overflow(v: Variant, planted: bool):
    model = mlp(v, out=16).half()

    def loss(m):
        x = m(v.data(v.batch, 6, v.width).half())
        q = x * (v.pick(4e3, 8e3, 3e3) if planted else 1.0) + (200 if planted else 0)
        weights = torch.softmax(q @ q.transpose(1, 2), -1)  # fault
        return v.reduce(weights @ x)

    return two(model, loss)


@fails("convolution", "forward", 0, "overflow", module=lambda v: v.name("0"), dtype="float16")
def convolution_overflows(v: Variant, planted: bool):
    model = build(v, nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4 * (v.width - 2), 1)).half()
    nn.init.constant_((model.body if v.nested else model)[0].weight, 20.0)
    x = torch.full((v.batch, 2, v.width), 2e3 if planted else 0.1).half()
    return two(model, lambda m: v.reduce(m(x)))


@fails("sum", "forward", 0, "overflow", dtype="float16")
def sum_overflows(v: Variant, planted: bool):
    model = mlp(v, out=4).half()

    def loss(m):
        y = m(v.data().half()) * 0.1 + (v.pick(6e3, 4e3, 9e3) if planted else 0.0)
        return (y.float() - 1).pow(2).mean() + y.sum().float()  # fault

    return two(model, loss)


@fails("pow", "forward", 1, "overflow", dtype="float16")
def squared_error_overflows(v: Variant, planted: bool):
    model = mlp(v, out=2).half()
    targets = [torch.zeros(v.batch, 2).half(), torch.full((v.batch, 2), 400.0 if planted else 1.0).half()]
    return train(model, lambda m, i: (m(v.data().half()) - targets[i]).pow(2).mean(), 2)  # fault


@fails("_to_copy", "source", 0, "cast_overflow", dtype="float16")
def input_does_not_fit(v: Variant, planted: bool):
    model = mlp(v, out=2).half()
    x = v.data() * (1e6 if planted else 1.0)
    return two(model, lambda m: v.reduce(m(x.half())))  # fault


@fails("_to_copy", "source", 0, "cast_overflow", dtype="float16")
def parameter_does_not_fit(v: Variant, planted: bool):
    model = mlp(v, out=2)
    with torch.no_grad():
        next(model.parameters())[0, 1] = v.pick(1e5, 7e4, 1e9) if planted else 1.0
    model.half()  # fault
    return two(model, lambda m: v.reduce(m(v.data().half())))


@fails("_to_copy", "forward", 1, "cast_overflow", dtype="float16", module=lambda v: v.name("0"))
def autocast_input_does_not_fit(v: Variant, planted: bool):
    model = mlp(v, out=2)
    factors = (1.0, v.pick(1e6, 3e5, 1e8) if planted else 1.0)

    def loss(m, step):
        with torch.autocast("cpu", torch.float16):
            return v.reduce(m(v.data() * factors[step]))

    return train(model, loss, 2)


@fails("_to_copy", "source", 0, "cast_overflow", dtype="float16")
def integers_do_not_fit(v: Variant, planted: bool):
    model = mlp(v, out=2).half()
    ids = torch.arange(v.width) * (v.pick(20000, 30000, 10000) if planted else 1)
    return two(model, lambda m: v.reduce(m(ids.half().expand(v.batch, -1) * 0.01)))  # fault


@fails("_to_copy", "forward", 0, "cast_overflow", dtype="float16")
def loss_does_not_fit(v: Variant, planted: bool):
    model = mlp(v, out=2)

    def loss(m):
        total = (m(v.data()) * (300.0 if planted else 1.0)).pow(2).sum() + (1e5 if planted else 0)
        return total.half()  # fault

    return two(model, loss)


@fails("copy_", "source", 0, "cast_overflow", dtype="float16")
def staging_buffer_of_half(v: Variant, planted: bool):
    model = mlp(v, out=2).half()
    staging = torch.zeros(v.batch, v.width, dtype=torch.float16)

    def loss(m):
        staging.copy_(v.data(scale=1e7 if planted else 1.0))  # fault
        return v.reduce(m(staging))

    return two(model, loss)


@fails("add", "forward", 0, "underflow", dtype="float16", root=True, born="div")
def eps_vanishes_in_half(v: Variant, planted: bool):
    model = mlp(v, out=4).half()
    eps = v.pick(1e-8, 1e-12, 2e-8) if planted else 1e-3
    x = v.data().half()
    x[0] = 0

    def loss(m):
        scale = x.abs().mean(-1, keepdim=True) + eps  # fault
        return v.reduce(m(x / scale))

    return two(model, loss)


@fails("clamp_min", "forward", 0, "underflow", dtype="float16", root=True, born="log")
def clamp_vanishes_in_half(v: Variant, planted: bool):
    model = mlp(v, out=4).half()
    floor = v.pick(1e-8, 1e-10, 1e-9) if planted else 1e-4

    def loss(m):
        p = torch.relu(m(v.data().half())) * 0
        return v.reduce(torch.log(p.clamp_min(floor)))  # fault

    return two(model, loss)


@fails("clamp", "forward", 0, "underflow", root=True, born="log")
def upper_clamp_rounds_to_one(v: Variant, planted: bool):
    model = mlp(v, out=1)
    eps = 1e-8 if planted else 1e-6

    def loss(m):
        p = torch.sigmoid(m(v.data()) * 0.1 + (v.pick(40.0, 25.0, 60.0) if planted else 1.0))
        return -torch.log(1 - p.clamp(eps, 1 - eps)).mean()  # fault

    return two(model, loss)


@fails("pow", "forward", 0, "underflow", dtype="float16", root=True, born="div")
def squares_vanish_in_half(v: Variant, planted: bool):
    model = mlp(v, out=4).half()
    x = v.data().half() * (v.pick(1e-5, 2e-5, 1e-5) if planted else 1.0)

    def loss(m):
        length = x.pow(2).sum(-1, keepdim=True).sqrt()  # fault
        return v.reduce(m(x / length))

    return two(model, loss)


@fails("mul", "forward", 0, "underflow", root=True, born="log")
def product_of_probabilities(v: Variant, planted: bool):
    model = mlp(v, out=3)

    def loss(m):
        p = torch.softmax(m(v.data()), -1)
        path = p[:, 0]
        for _ in range(v.pick(160, 120, 200) if planted else 4):
            path = path * p[:, 1] * 0.5  # fault
        return -torch.log(path).mean()

    return two(model, loss)


@fails("exp", "forward", 0, "underflow", root=True, born="div")
def kernel_weights_vanish(v: Variant, planted: bool):
    model = mlp(v, out=3)

    def loss(m):
        y = m(v.data())
        distance = (y - 1).pow(2).sum(-1, keepdim=True) + (v.pick(150.0, 400.0, 900.0) if planted else 0.0)
        weight = torch.exp(-distance)  # fault
        return v.reduce(y * (weight / weight.sum(0)))

    return two(model, loss)


@fails("_to_copy", "source", 0, "underflow", dtype="float16", root=True, born="div")
def scale_vanishes_in_a_cast(v: Variant, planted: bool):
    model = mlp(v, out=3).half()
    scale = torch.full((v.width,), v.pick(1e-8, 2e-9, 1e-10) if planted else 0.5)

    def loss(m):
        return v.reduce(m(v.data().half() / scale.half()))  # fault

    return two(model, loss)


@fails("mm", "forward", 0, "explosion", root=True, module=lambda v: v.name("12"))
def deep_initialisation_explodes(v: Variant, planted: bool):
    layers = [nn.Linear(v.width, v.width, bias=False) for _ in range(14)]
    for layer in layers:
        nn.init.constant_(layer.weight, (1000.0 if planted else 0.5) / v.width)
    return two(build(v, *layers), lambda m: v.reduce(m(torch.ones(v.batch, v.width))))


@fails("", "forward", 0, "explosion", dtype="float16", root=True, module=lambda v: v.name("10.fc"))
def residual_stream_explodes_in_half(v: Variant, planted: bool):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(v.width, v.width)
            nn.init.constant_(self.fc.weight, (2.0 if planted else 0.02) / v.width)

        def forward(self, x):
            return x + self.fc(x)

    model = build(v, *(Block() for _ in range(12))).half()
    return two(model, lambda m: v.reduce(m(torch.ones(v.batch, v.width).half())))


@fails("mm", "forward", 0, "explosion", root=True)
def recurrent_state_explodes(v: Variant, planted: bool):
    w = nn.Parameter(torch.eye(v.width) * (v.pick(30.0, 50.0, 100.0) if planted else 0.9))
    h0 = torch.ones(v.batch, v.width)

    def loop():
        h = h0
        for _ in range(40):
            h = h @ w  # fault
        return v.reduce(h)

    optimizer = torch.optim.SGD([w], lr=1e-3)
    return train(nn.ParameterList([w]), lambda m, _: loop(), 2, optimizer)


@fails("cumsum", "forward", 0, "overflow", dtype="float16")
def running_total_overflows(v: Variant, planted: bool):
    model = mlp(v, out=1).half()

    def loss(m):
        y = m(v.data(v.batch, 30, v.width).half()).squeeze(-1) * 0.1 + (5e3 if planted else 0.0)
        return v.reduce(torch.cumsum(y, 1) * 1e-3)  # fault

    return two(model, loss)


@fails("linalg_vector_norm", "forward", 0, "overflow", dtype="float16", silent=True)
def norm_overflows_in_half(v: Variant, planted: bool):
    model = mlp(v, out=v.width).half()

    def loss(m):
        y = m(v.data().half()) + (4e4 if planted else 0.0)
        return v.reduce(y / y.norm(dim=-1, keepdim=True))  # fault

    return moved(model, lambda: two(model, loss))


@fails("mul", "forward", 0, "overflow", dtype="bfloat16")
def bfloat16_product_overflows(v: Variant, planted: bool):
    model = mlp(v, out=3).bfloat16()

    def loss(m):
        y = m(v.data().bfloat16()) + (v.pick(1e20, 1e25, 3e19) if planted else 0.0)
        return v.reduce(y * y)  # fault

    return two(model, loss)


@fails("native_group_norm", "forward", 0, "overflow", module=lambda v: v.name("1"), silent=True, root=True)
def group_norm_of_huge_activations(v: Variant, planted: bool):
    model = build(v, nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * (v.width - 2), 1))
    x = v.data(v.batch, 2, v.width, scale=1e25 if planted else 1.0)
    first = (model.body if v.nested else model)[0]
    return moved(first, lambda: two(model, lambda m: v.reduce(m(x))))


@fails("mul", "forward", 0, "overflow", dtype="float16")
def logits_scaled_by_a_learned_temperature(v: Variant, planted: bool):
    model = mlp(v, out=5).half()
    temperature = nn.Parameter(torch.tensor(v.pick(10.5, 10.0, 10.8) if planted else 0.1))

    def loss(m):
        logits = (m(v.data().half()) * 20 + 20) * temperature.exp().half()  # fault
        return F.cross_entropy(logits.float() * 1.0, torch.zeros(v.batch, dtype=torch.long))

    return two(model, loss)
