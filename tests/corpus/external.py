"""Faults that were there before: inputs, targets, parameters, buffers, optimizer state, checkpoints."""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from corpus.case import ANY, Variant, build, fails, mlp, train

INF, NAN = math.inf, math.nan


@fails("input", "source", 1, "external")
def nan_in_a_table(v: Variant, planted: bool):
    model = mlp(v)
    tables = [np.random.default_rng(v.seed + i).normal(size=(v.batch, v.width)).astype("f4") for i in range(3)]
    if planted:
        tables[1][2, 1] = NAN
    return train(model, lambda m, i: v.reduce(m(torch.from_numpy(tables[i]))), 3)


@fails("input", "source", 0, "external")
def infinite_feature(v: Variant, planted: bool):
    model = mlp(v)
    x = v.data()
    if planted:
        x = torch.tensor([[INF if (i, j) == (1, 1) else 0.5 for j in range(v.width)] for i in range(v.batch)])
    return train(model, lambda m, _: v.reduce(m(x)), 2)


@fails("input", "source", 2, "external")
def nan_target(v: Variant, planted: bool):
    model = mlp(v)
    targets = [torch.ones(v.batch, 1) for _ in range(4)]
    if planted:
        targets[2] = torch.tensor([[NAN] if i == 0 else [1.0] for i in range(v.batch)])
    return train(model, lambda m, i: F.mse_loss(m(v.data()), targets[i]), 4)  # fault


def damage(model, name, planted):
    """As a file or another library would bring it: not by an operation."""
    if planted:
        model.state_dict()[name].numpy().reshape(-1)[1] = NAN
    return model


@fails("param", "source", 0, "external", module=lambda v: v.name("2"))
def checkpoint_with_a_nan(v: Variant, planted: bool):
    model = damage(mlp(v), v.name("2.weight"), planted)
    return train(model, lambda m, _: v.reduce(m(v.data())), 2)


@fails("param", "source", 0, "external", module=lambda v: v.name("1"))
def running_mean_is_nan(v: Variant, planted: bool):
    model = build(v, nn.Linear(v.width, v.width), nn.BatchNorm1d(v.width))
    model = damage(model, v.name("1.running_mean"), planted).eval()
    return train(model, lambda m, _: v.reduce(m(v.data())), 2)


@fails("param", "source", 0, "external", module=lambda v: v.name("0"))
def embedding_row_is_nan(v: Variant, planted: bool):
    model = damage(build(v, nn.Embedding(6, v.width), nn.Linear(v.width, 2)), v.name("0.weight"), planted)
    return train(model, lambda m, _: v.reduce(m(torch.arange(6))), 2)


@fails("param", "source", 1, "external", module=ANY)
def saved_moment_is_nan(v: Variant, planted: bool):
    model = mlp(v)
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    train(model, lambda m, _: v.reduce(m(v.data())), 1, optimizer)
    if planted:
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0]["exp_avg"].reshape(-1).numpy()[0] = NAN
        optimizer.load_state_dict(state)
    return train(model, lambda m, _: v.reduce(m(v.data())), 2, optimizer)


@fails("input", "source", 0, "external")
def nan_written_into_a_batch(v: Variant, planted: bool):
    model = mlp(v)
    x = v.data()
    if planted:
        x[1, 2] = NAN
    return train(model, lambda m, _: v.reduce(m(x)), 2)


@fails("input", "source", 0, "external")
def missing_values_marked_by_nan(v: Variant, planted: bool):
    model = mlp(v)
    x = v.data()
    if planted:
        x[x > 0.5] = NAN
    return train(model, lambda m, _: v.reduce(m(x)), 2)


@fails("input", "source", 1, "external")
def infinity_written_into_a_batch(v: Variant, planted: bool):
    model = mlp(v)

    def loss(m, step):
        x = v.data()
        if planted and step == 1:
            x[0] = INF
        return v.reduce(m(x))

    return train(model, loss, 3)


@fails("param", "source", 0, "external", module=lambda v: v.name("2"))
def nan_written_into_a_parameter(v: Variant, planted: bool):
    model = mlp(v)
    if planted:
        with torch.no_grad():
            (model.body if v.nested else model)[2].weight[0, 1] = NAN
    return train(model, lambda m, _: v.reduce(m(v.data())), 2)


@fails("param", "source", 0, "external", module=lambda v: v.name("0"))
def infinite_parameter(v: Variant, planted: bool):
    model = mlp(v)
    if planted:
        (model.body if v.nested else model)[0].bias.data[1] = -INF if v.index else INF
        (model.body if v.nested else model)[0].weight.data.mul_(1.0)
    out = train(model, lambda m, _: (m(v.data()) * m(v.data())).mean() - sum(p.sum() for p in m.parameters()), 2)
    return out


@fails("param", "source", 0, "external", module=lambda v: v.name("2"))
def loaded_state_holds_a_nan(v: Variant, planted: bool):
    model = mlp(v)
    state = {k: torch.from_numpy(t.numpy().copy()) for k, t in model.state_dict().items()}
    if planted:
        state[v.name("2.bias")].numpy()[0] = NAN
    model.load_state_dict(state)
    return train(model, lambda m, _: v.reduce(m(v.data())), 2)


@fails("input", "source", 0, "external")
def soft_label_is_nan(v: Variant, planted: bool):
    model = mlp(v, out=3)
    soft = torch.softmax(v.data(v.batch, 3), -1)
    if planted:
        soft[0] = NAN
    return train(model, lambda m, _: F.cross_entropy(m(v.data()), soft), 2)
