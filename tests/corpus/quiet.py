"""Healthy programs, many full of Inf and NaN that are meant or come to nothing."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from corpus.case import Variant, healthy, mlp, train

INF = math.inf


@healthy
def causal_attention(v: Variant):
    model = mlp(v, out=16)
    mask = torch.full((6, 6), -INF).triu(1)

    def loss(m, _):
        x = m(v.data(v.batch, 6, v.width))
        return v.reduce(torch.softmax(x @ x.transpose(1, 2) / 4 + mask, -1) @ x)

    train(model, loss)


@healthy
def padding_in_half(v: Variant):
    model = mlp(v, out=5)
    mask = torch.arange(5) < torch.randint(1, 6, (v.batch, 1))

    def loss(m, _):
        with torch.autocast("cpu", torch.bfloat16):
            scores = m(v.data()).masked_fill(~mask, -INF)
            return v.reduce(torch.log_softmax(scores.float(), -1).masked_fill(~mask, 0.0))

    train(model, loss)


@healthy
def safe_where(v: Variant):
    model = mlp(v, out=3)

    def loss(m, _):
        y = m(v.data())
        positive = y > 0
        return v.reduce(torch.where(positive, torch.log(torch.where(positive, y, 1.0)), y))

    train(model, loss)


@healthy
def scaler_finds_its_scale(v: Variant):
    model = mlp(v, out=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** v.pick(30, 26, 34))
    for _ in range(25):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = v.reduce(model(v.data()))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


@healthy
def best_value_begins_infinite(v: Variant):
    model = mlp(v)
    best, history = torch.tensor(INF), torch.full((5,), INF)
    for step in range(5):
        loss = train(model, lambda m, _: v.reduce(m(v.data())), 1)[0]
        best = torch.minimum(best, loss)
        history[step] = loss
    assert torch.isfinite(best)


@healthy
def early_large_values_decline(v: Variant):
    model = mlp(v, activation=nn.ReLU)
    x = v.data(scale=1e3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, lambda m, _: (m(x) - 1e4).pow(2).mean(), 20, optimizer)


@healthy
def unused_experts(v: Variant):
    experts = nn.ModuleList(nn.Linear(v.width, 2) for _ in range(4))
    gate = nn.Linear(v.width, 4)
    model = nn.ModuleList([experts, gate])
    gate.bias.data[0] = 5.0

    def loss(m, _):
        x = v.data()
        weights = torch.softmax(gate(x), -1)
        top = weights.argmax(-1)
        return v.reduce(sum(e(x) * ((top == i).float() * weights[:, i])[:, None] for i, e in enumerate(experts)))

    train(model, loss, 4)


@healthy
def frozen_backbone(v: Variant):
    body, head = mlp(v, out=v.width), nn.Linear(v.width, 2)
    for p in body.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        v.reduce(head(body(v.data()))).backward()
        optimizer.step()


@healthy
def dead_units_among_living(v: Variant):
    model = mlp(v, activation=nn.ReLU)
    with torch.no_grad():
        next(iter(model.modules()))
        for p in list(model.parameters())[1:2]:
            p[: v.width // 3] = -100.0
    train(model, lambda m, _: v.reduce(m(v.data(16, v.width))), 4)


@healthy
def embeddings_used_sparsely(v: Variant):
    table, head = nn.Embedding(50, v.width, padding_idx=0), nn.Linear(v.width, 2)
    model = nn.ModuleList([table, head])
    train(model, lambda m, i: v.reduce(head(table(torch.randint(0, 5 + i, (v.batch, 3))))), 4)


@healthy
def evaluation_divides_zero_by_zero(v: Variant):
    model = mlp(v, out=2)
    train(model, lambda m, _: v.reduce(m(v.data())), 2)
    with torch.no_grad():
        hits = (model(v.data()).argmax(-1) > 7).float().sum()
        torch.nan_to_num(hits / hits, 0.0).item()


@healthy
def metric_that_may_be_nan_is_skipped(v: Variant):
    model = mlp(v, out=2)
    total = 0.0
    for _ in range(3):
        train(model, lambda m, _: v.reduce(m(v.data())), 1)
        ratio = (torch.zeros(3) / torch.zeros(3)).nanmean().nan_to_num()
        total += ratio.item()


@healthy
def warm_up_from_zero(v: Variant):
    model = mlp(v)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss(m, step):
        optimizer.param_groups[0]["lr"] = 0.01 * step
        return v.reduce(m(v.data()))

    train(model, loss, 4, optimizer)


@healthy
def gradient_accumulation_with_clipping(v: Variant):
    model = mlp(v, activation=nn.GELU)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(6):
        (v.reduce(model(v.data())) / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


@healthy
def zero_initialised_head(v: Variant):
    model = mlp(v)
    last = list(model.modules())[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    x = v.data()
    train(model, lambda m, _: (m(x) - x.sum(-1, keepdim=True)).pow(2).mean(), 4)


@healthy
def stable_losses_of_extreme_logits(v: Variant):
    model = mlp(v, out=4)
    target = torch.zeros(v.batch, dtype=torch.long)

    def loss(m, _):
        z = m(v.data()) * 300
        return F.cross_entropy(z, target) + F.binary_cross_entropy_with_logits(z, torch.ones_like(z))

    train(model, loss)


@healthy
def top_k_sampling(v: Variant):
    model = mlp(v, out=10)
    train(model, lambda m, _: v.reduce(m(v.data())), 1)
    with torch.no_grad():
        logits = model(v.data())
        kept = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -INF)
        torch.multinomial(torch.softmax(kept, -1), 1)


@healthy
def adversary_with_hinge(v: Variant):
    critic, maker = mlp(v), mlp(v, out=v.width)
    first, second = torch.optim.Adam(critic.parameters()), torch.optim.Adam(maker.parameters())
    for _ in range(3):
        first.zero_grad()
        F.relu(1 - critic(v.data())).add(F.relu(1 + critic(maker(v.data()).detach()))).mean().backward()
        first.step()
        second.zero_grad()
        (-critic(maker(v.data())).mean()).backward()
        second.step()


@healthy
def loss_reaches_zero(v: Variant):
    model = nn.Linear(v.width, 1, bias=False)
    nn.init.zeros_(model.weight)
    train(model, lambda m, _: F.relu(m(v.data()).abs() - 1.0).mean(), 3)


@healthy
def running_maximum_and_minimum(v: Variant):
    model = mlp(v, out=3)
    low, high = torch.full((3,), INF), torch.full((3,), -INF)

    def loss(m, _):
        y = m(v.data())
        torch.minimum(low, y.detach().amin(0), out=low)
        torch.maximum(high, y.detach().amax(0), out=high)
        return v.reduce((y - low) / (high - low))

    train(model, loss)


@healthy
def torch_defuses_a_constant_deviation(v: Variant):
    model = mlp(v, out=3)
    x = v.data()
    x[:] = x[0]
    train(model, lambda m, _: v.reduce(m(x).std(0)) + m(v.data()).mean())


@healthy
def torch_defuses_the_angle_of_the_origin(v: Variant):
    model = mlp(v, out=2)

    def loss(m, _):
        y = m(v.data())
        still = y - y.detach()
        return torch.atan2(still[:, 0], still[:, 1]).mean() + y.mean()

    train(model, loss)


@healthy
def a_wide_range_of_learning_rates(v: Variant):
    model = mlp(v, activation=nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=v.pick(0.5, 0.3, 1.0))
    x = v.data(16, v.width)
    train(model, lambda m, _: (m(x) - 3).pow(2).mean(), 25, optimizer)


@healthy
def logistic_by_hand_in_a_metric(v: Variant):
    model = mlp(v, out=1)
    train(model, lambda m, _: v.reduce(m(v.data())), 2)
    with torch.no_grad():
        z = model(v.data()) * 1e4
        (1 / (1 + torch.exp(-z))).round().mean().item()


@healthy
def bfloat16_weights_that_learn(v: Variant):
    model = mlp(v, out=2).bfloat16()
    train(model, lambda m, _: v.reduce(m(v.data().bfloat16())), 5, torch.optim.SGD(model.parameters(), lr=0.1))
