"""Faults born in the forward pass: logarithms, divisions, roots, products, reductions, normalisations."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from corpus.case import Variant, build, fails, mlp, train

INF = math.inf


def one_step(model, loss_of, **options):
    return train(model, lambda m, _: loss_of(m), 2, **options)


@fails("log", "forward", 0, "log_of_zero")
def log_of_relu(v: Variant, planted: bool):
    model = mlp(v, out=3)
    floor = 0.0 if planted else 1e-3

    def loss(m):
        x = v.data()
        return torch.log(torch.relu(m(x) - 20 * planted) + floor).mean()  # fault

    return one_step(model, loss)


@fails("log", "forward", 2, "log_of_zero")
def log_of_a_count(v: Variant, planted: bool):
    model = mlp(v)
    counts = [torch.full((v.batch, v.width), 3.0) for _ in range(4)]
    if planted:
        counts[2][1, 2] = 0.0

    def loss(m, step):
        return v.reduce(m(torch.log(counts[step])))  # fault

    return train(model, loss, 4)


@fails("_softmax", "forward", 0, "underflow", root=True, born="log")
def log_of_a_softmax(v: Variant, planted: bool):
    model = mlp(v, out=5)
    gain = v.pick(900.0, 2000.0, 700.0) if planted else 1.0

    def loss(m):
        p = torch.softmax(m(v.data()) * gain + torch.arange(5) * gain / 2, -1)  # fault
        return -torch.log(p)[:, 0].mean()

    return one_step(model, loss)


@fails("div", "forward", 0, "zero_over_zero")
def normalise_a_zero_row(v: Variant, planted: bool):
    model = mlp(v, out=4)
    x = v.data()
    if planted:
        x[0] = 0

    def loss(m):
        return v.reduce(m(x / x.norm(dim=-1, keepdim=True)))  # fault

    return one_step(model, loss)


@fails("div", "forward", 1, "zero_over_zero")
def masked_mean_of_an_empty_row(v: Variant, planted: bool):
    model = mlp(v, out=1)
    lengths = [torch.ones(v.batch, 5), torch.ones(v.batch, 5)]
    if planted:
        lengths[1][v.batch - 1] = 0

    def loss(m, step):
        y = m(v.data(v.batch, 5, v.width)).squeeze(-1) * lengths[step]
        return v.reduce(y.sum(1) / lengths[step].sum(1))  # fault

    return train(model, loss, 2)


@fails("div", "forward", 0, "division_by_zero")
def weights_that_sum_to_zero(v: Variant, planted: bool):
    model = mlp(v, out=1)
    weights = torch.ones(v.batch)
    if planted:
        weights.zero_()

    def loss(m):
        return (m(v.data()) - 1).pow(2).sum() / weights.sum()  # fault

    return one_step(model, loss)


@fails("sqrt", "forward", 0, "sqrt_of_negative")
def variance_by_cancellation(v: Variant, planted: bool):
    model = mlp(v, out=2)
    x = v.data(4 * v.batch, v.width) * (1e-2 if planted else 1.0) + (v.pick(3e3, 1e4, 5e3) if planted else 0.0)

    def loss(m):
        variance = x.pow(2).mean(0) - x.mean(0).pow(2)
        return v.reduce(m(x / torch.sqrt(variance + 1e-9)))  # fault

    return one_step(model, loss)


@fails("exp", "forward", 0, "overflow")
def softmax_by_hand(v: Variant, planted: bool):
    model = mlp(v, out=4)

    def loss(m):
        e = torch.exp(m(v.data()) + (v.pick(100.0, 95.0, 400.0) if planted else 0.0))  # fault
        return -torch.log(e / e.sum(-1, keepdim=True))[:, 1].mean()

    return one_step(model, loss)


@fails("exp", "forward", 0, "overflow", dtype="float16")
def softmax_by_hand_in_half(v: Variant, planted: bool):
    model = mlp(v, out=4).half()

    def loss(m):
        z = m(v.data().half())
        e = torch.exp(z + (v.pick(12.0, 15.0, 30.0) if planted else 0.0))  # fault
        return v.reduce(e / e.sum(-1, keepdim=True))

    return one_step(model, loss)


@fails("acos", "forward", 0, "domain")
def angle_of_rounded_cosine(v: Variant, planted: bool):
    model = mlp(v, out=6)

    def loss(m):
        a = m(v.data())
        unit = a / a.norm(dim=-1, keepdim=True)
        cosine = (unit * unit.detach()).sum(-1) * (1.0001 if planted else 0.9)
        return v.reduce(torch.acos(cosine))  # fault

    return one_step(model, loss)


@fails("pow", "forward", 0, "domain")
def fractional_power_of_a_negative(v: Variant, planted: bool):
    model = mlp(v, out=4)

    def loss(m):
        y = m(v.data(4 * v.batch, v.width))
        return v.reduce((y if planted else y.abs() + 0.1) ** 1.7)  # fault

    return one_step(model, loss)


@fails("log1p", "forward", 1, "log_of_zero")
def log1p_at_its_pole(v: Variant, planted: bool):
    model = mlp(v)
    returns = [v.data() * 0.01, v.data() * 0.01]
    if planted:
        returns[1][0, 0] = -1.0

    def loss(m, step):
        return v.reduce(m(torch.log1p(returns[step])))  # fault

    return train(model, loss, 2)


@fails("_softmax", "forward", 0, "inf_minus_inf")
def fully_masked_row(v: Variant, planted: bool):
    model = mlp(v, out=5)
    mask = torch.zeros(v.batch, 5, dtype=torch.bool)
    mask[:, 0] = True
    mask[1] |= planted

    def loss(m):
        scores = m(v.data()).masked_fill(mask, -INF)
        return v.reduce(torch.softmax(scores, -1))  # fault

    return one_step(model, loss)


@fails("sub", "forward", 0, "inf_minus_inf")
def row_of_padding_minus_its_maximum(v: Variant, planted: bool):
    model = mlp(v, out=5)
    mask = torch.zeros(v.batch, 5, dtype=torch.bool)
    mask[:, 0] = True
    mask[0] |= planted

    def loss(m):
        scores = torch.where(mask, -INF, m(v.data()))
        shifted = scores - scores.max(-1, keepdim=True).values  # fault
        return v.reduce(torch.exp(shifted).sum(-1))

    return one_step(model, loss)


@fails("mul", "forward", 0, "zero_times_inf")
def infinite_fill_times_mask(v: Variant, planted: bool):
    model = mlp(v, out=4)
    mask = torch.ones(4)
    mask[2] = 0

    def loss(m):
        scores = m(v.data()).masked_fill(mask == 0, -INF if planted else -1e4)
        return v.reduce((scores * mask).sum(-1))  # fault

    return one_step(model, loss)


@fails("div", "forward", 0, "inf_over_inf")
def share_of_an_infinite_distance(v: Variant, planted: bool):
    model = mlp(v, out=4)
    missing = torch.zeros(4, dtype=torch.bool)
    missing[3] = True

    def loss(m):
        distance = m(v.data()).abs().masked_fill(missing, INF if planted else 10.0)
        return v.reduce(distance / distance.sum(-1, keepdim=True))  # fault

    return one_step(model, loss)


@fails("mean", "forward", 0, "empty_reduction")
def mean_of_no_positives(v: Variant, planted: bool):
    model = mlp(v, out=2)
    positive = torch.zeros(v.batch, dtype=torch.bool)
    positive[0] = not planted

    def loss(m):
        y = m(v.data())
        return v.reduce(y) + y[positive].mean()  # fault

    return one_step(model, loss)


@fails("std", "forward", 1, "empty_reduction")
def deviation_of_a_last_batch_of_one(v: Variant, planted: bool):
    model = mlp(v, out=3)
    sizes = (v.batch, 1 if planted else 2)

    def loss(m, step):
        y = m(v.data(sizes[step], v.width))
        return v.reduce(y) + y.std(0).sum()  # fault

    return train(model, loss, 2)


@fails("nll_loss_forward", "forward", 0, "empty_reduction")
def every_token_ignored(v: Variant, planted: bool):
    model = mlp(v, out=5)
    target = torch.full((v.batch,), -100)
    target[0] = -100 if planted else 2

    def loss(m):
        return F.cross_entropy(m(v.data()), target)  # fault

    return one_step(model, loss)


@fails("rsqrt", "forward", 0, "division_by_zero")
def reciprocal_root_of_zero_variance(v: Variant, planted: bool):
    model = mlp(v, out=3)
    x = torch.ones(v.batch, v.width)

    def loss(m):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + (0.0 if planted else 1e-5))  # fault
        return v.reduce(m(centred * scale))

    return one_step(model, loss)


@fails("reciprocal", "forward", 0, "division_by_zero")
def inverse_frequency_of_an_empty_class(v: Variant, planted: bool):
    model = mlp(v, out=3)
    target = torch.zeros(v.batch, dtype=torch.long)
    target[1] = 1
    if not planted:
        target[2] = 2

    def loss(m):
        counts = torch.bincount(target, minlength=3).float()
        return v.reduce(m(v.data()) * counts.reciprocal())  # fault

    return one_step(model, loss)


@fails("pow", "forward", 0, "division_by_zero")
def negative_power_of_zero(v: Variant, planted: bool):
    model = mlp(v, out=3)
    distance = torch.arange(v.width).float() + (not planted)

    def loss(m):
        return v.reduce(m(v.data() * distance**-2))  # fault

    return one_step(model, loss)


@fails("log", "forward", 0, "log_of_zero")
def cross_entropy_by_hand_of_a_certain_sigmoid(v: Variant, planted: bool):
    model = mlp(v, out=1)

    def loss(m):
        p = torch.sigmoid(m(v.data()) * 0.1 + (v.pick(40.0, 25.0, 60.0) if planted else 0.0))
        return -torch.log(1 - p).mean()  # fault

    return one_step(model, loss)


@fails("native_layer_norm", "forward", 0, "zero_over_zero", module=lambda v: v.name("0"))
def layer_norm_without_eps(v: Variant, planted: bool):
    model = build(v, nn.LayerNorm(v.width, eps=0.0 if planted else 1e-5), nn.Linear(v.width, 2))
    return one_step(model, lambda m: v.reduce(m(torch.ones(v.batch, v.width))))


@fails("native_batch_norm", "forward", 0, "overflow", module=lambda v: v.name("1"))
def batch_norm_of_huge_activations(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.BatchNorm1d(v.width), nn.Linear(v.width, 2))
    scale = v.pick(1e25, 1e30, 1e22) if planted else 1.0
    return [*one_step(model, lambda m: v.reduce(m(v.data(scale=scale)))), *model.buffers()]


@fails("native_batch_norm", "forward", 0, "sqrt_of_negative", module=lambda v: v.name("0"))
def negative_running_variance(v: Variant, planted: bool):
    norm = nn.BatchNorm1d(v.width)
    norm.running_var[2] = -1.0 if planted else 1.0
    model = build(v, norm, nn.Linear(v.width, 2)).eval()
    return one_step(model, lambda m: v.reduce(m(v.data())))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, padding):
        return x + self.attention(x, x, x, key_padding_mask=padding, need_weights=True)[0]


@fails("_softmax", "forward", 0, "inf_minus_inf", module="attention")
def attention_over_nothing_but_padding(v: Variant, planted: bool):
    model = Attention()
    padding = torch.zeros(v.batch, 5, dtype=torch.bool)
    padding[1, 2:] = True
    padding[1] |= planted
    return one_step(model, lambda m: v.reduce(m(v.data(v.batch, 5, 16), padding)))


@fails("nll_loss_forward", "forward", 0, "zero_over_zero")
def class_weights_of_zero(v: Variant, planted: bool):
    model = mlp(v, out=3)
    weight = torch.tensor([0.0 if planted else 0.5, 1.0, 1.0])

    def loss(m):
        return F.cross_entropy(m(v.data()), torch.zeros(v.batch, dtype=torch.long), weight=weight)  # fault

    return one_step(model, loss)


@fails("exp", "forward", 0, "overflow")
def gaussian_with_a_tiny_log_variance(v: Variant, planted: bool):
    model = mlp(v, out=2)

    def loss(m):
        mean, log_variance = m(v.data()).unbind(-1)
        precision = torch.exp(-(log_variance - (v.pick(90.0, 120.0, 200.0) if planted else 0.0)))  # fault
        return v.reduce((mean - 1).pow(2) * precision + log_variance)

    return one_step(model, loss)


@fails("log", "forward", 0, "log_of_zero")
def divergence_of_a_missing_class(v: Variant, planted: bool):
    model = mlp(v, out=3)
    prior = torch.tensor([0.5, 0.5, 0.0 if planted else 0.1])

    def loss(m):
        p = torch.softmax(m(v.data()), -1)
        return (p * (torch.log(p) - torch.log(prior))).sum(-1).mean()  # fault

    return one_step(model, loss)


@fails("log2", "forward", 0, "domain")
def logarithm_of_a_negative(v: Variant, planted: bool):
    model = mlp(v, out=3)

    def loss(m):
        y = m(v.data())
        return v.reduce(torch.log2(y - 50 if planted else y.abs() + 1))  # fault

    return one_step(model, loss)
