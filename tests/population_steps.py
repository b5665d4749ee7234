"""A member's steps beside nn.MLP's and torch.optim's, from copied state: what tests of every device compare."""

from __future__ import annotations

import copy

import torch
from closeness import SEEDS, assert_no_worse_than
from population_cases import classes_table, moments, numbers_table, order, population
from torch.nn import functional as F

from mlpkit.population import Member

STEPS, ROWS = 5, 48
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def optimizer_for(member, model):
    settings = {"lr": member.lr, "weight_decay": member.weight_decay}
    if member.optimizer in ("adam", "adamw"):
        settings |= {"betas": member.betas, "eps": member.eps}
    else:
        settings |= {"momentum": member.momentum}
    if member.optimizer == "sgd":
        settings["nesterov"] = member.nesterov
    if member.optimizer == "rmsprop":
        settings |= {"alpha": member.alpha, "eps": member.eps}
    return OPTIMIZERS[member.optimizer](model.parameters(), **settings)


def named_like_members(model):
    """Parameters of nn.MLP by the names that members give them."""
    return dict(model.named_parameters())


def copy_state(trained, model, optimizer, step):
    """Parameters, averages and moments of the member into a model and its optimizer."""
    tensors, first, second = moments(trained, 0)
    model.load_state_dict(
        {key: value.to(next(model.parameters()).dtype) for key, value in tensors.items()}, strict=False
    )
    for name, parameter in named_like_members(model).items():
        found = {}
        kind = type(optimizer)
        if kind is torch.optim.SGD:
            found = {"momentum_buffer": first[name]} if first and step else {}
        elif kind is torch.optim.RMSprop:
            found = {"square_avg": second[name]} | ({"momentum_buffer": first[name]} if first else {})
        else:
            found = {"exp_avg": first[name], "exp_avg_sq": second[name]}
        found = {key: value.clone().to(parameter.dtype) for key, value in found.items()}
        if kind is not torch.optim.SGD:
            found["step"] = torch.tensor(float(step))
        optimizer.state[parameter] = found


def loss_of(member, kind, output, y):
    if kind == "cross_entropy":
        return F.cross_entropy(output, y, label_smoothing=member.label_smoothing)
    if kind == "brier":
        return (output.softmax(1) - F.one_hot(y, output.shape[1])).square().sum(1).mean()
    return {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[kind](output, y.to(output.dtype))


def stock_step(trained, member, kind, dtype, table, step):
    """The member's next step by nn.MLP and torch.optim in this dtype; the state after it."""
    X, y = table
    found = order(member.seed, step, len(X))
    model = copy.deepcopy(trained.export(0, weights="last")).to(dtype).train()
    optimizer = optimizer_for(member, model)
    copy_state(trained, model, optimizer, step)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=member.precision == "bf16" and dtype == torch.float32)
    with autocast:
        output = model(X[found].to(dtype), seed=torch.tensor([member.seed, step]))
        loss = loss_of(member, kind, output.float() if autocast._enabled else output, y[found])
    loss.backward()
    for parameter in model.parameters():
        if member.l1:
            parameter.grad += member.l1 * parameter.detach().sign()
    if member.clip_norm:
        # clip_grad_norm_ adds 1e-6 to the norm, which members do not.
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, member.clip_norm / float(norm))
    optimizer.step()
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# Where a gradient is nearly 0, the quotient of adaptive updates makes much of its last bits, unless eps is no smaller.
COMMON = {"hidden": (24, 17), "lr": 1e-2, "batch_size": ROWS, "epochs": STEPS, "eps": 1e-3}
CASES = {
    "sgd": ("mse", {"optimizer": "sgd"}),
    "momentum": ("mse", {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-2, "dropout": 0.2}),
    "nesterov": ("huber", {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "l1": 1e-3}),
    "adam": ("cross_entropy", {"optimizer": "adam", "weight_decay": 1e-2, "dropout": 0.3}),
    "adamw": ("cross_entropy", {"optimizer": "adamw", "weight_decay": 0.1, "label_smoothing": 0.1}),
    "rmsprop": ("mse", {"optimizer": "rmsprop", "activation": "tanh"}),
    "rmsprop with momentum": ("l1", {"optimizer": "rmsprop", "momentum": 0.5, "activation": "gelu"}),
    "clipped": ("mse", {"optimizer": "sgd", "clip_norm": 0.01, "activation": "prelu"}),
    "layer norm": ("cross_entropy", {"optimizer": "sgd", "norm": "layer", "dropout": 0.2, "activation": "silu"}),
    "batch norm": ("cross_entropy", {"optimizer": "sgd", "momentum": 0.9, "norm": "batch", "dropout": 0.2}),
    "linear": ("cross_entropy", {"optimizer": "sgd", "hidden": ()}),
    "rows in place": ("cross_entropy", {"optimizer": "sgd", "columns": 70, "hidden": (29, 5), "dropout": 0.2}),
    "rows in place, batch norm": ("mse", {"optimizer": "adam", "columns": 40, "hidden": (16, 5), "norm": "batch"}),
    "brier": ("brier", {"optimizer": "sgd", "activation": "gelu", "dropout": 0.1}),
}


def assert_five_steps_err_no_more_than_torchs(name, **settings):
    """Five steps, each from copied state, over nine seeds. settings: of the population."""
    kind, fields = CASES[name]
    ours, stock, exact = {}, {}, {}
    for seed in SEEDS:
        make = classes_table if kind in ("cross_entropy", "brier") else numbers_table
        table = make(ROWS, fields.get("columns", 9), 3, seed=seed)
        wanted = {key: value for key, value in fields.items() if key != "columns"}
        member = Member(**(COMMON | {"seed": seed + 40} | wanted))
        trained = population([member], table, loss=kind, **settings)
        for step in range(STEPS):
            results = [
                stock_step(trained, member, kind, dtype, table, step) for dtype in (torch.float32, torch.float64)
            ]
            trained.train(1)
            tensors = trained._native.tensors(0, False)
            for place, found in zip((ours, stock, exact), (tensors, *results), strict=True):
                for key in tensors:
                    place.setdefault((step, key), []).append(found[key].detach().clone().double())
    for step, key in ours:
        group = [[one.float() for one in place[step, key]] for place in (ours, stock)]
        assert_no_worse_than(*group, exact[step, key], f"{name}, step {step}, {key}")


def assert_bf16_errs_no_more_than_autocast(**settings):
    """One step of members with precision bf16, over nine seeds. settings: of the population."""
    ours, stock, exact = {}, {}, {}
    for seed in SEEDS:
        table = classes_table(64, 40, 5, seed=seed)
        member = Member(hidden=(48, 33), dropout=0.1, optimizer="sgd", lr=0.1, batch_size=64, epochs=1, seed=seed)
        low = Member(**(vars(member) | {"precision": "bf16"}))
        trained = population([low], table, **settings)
        results = [
            stock_step(trained, low, "cross_entropy", dtype, table, 0) for dtype in (torch.float32, torch.float64)
        ]
        before = {key: value.clone() for key, value in trained._native.tensors(0, False).items()}
        trained.train(1)
        after = trained._native.tensors(0, False)
        for place, found in zip((ours, stock, exact), (after, *results), strict=True):
            for key in after:
                # Of the step itself: the parameter would hide the error of its gradient.
                place.setdefault(key, []).append(found[key].detach().double() - before[key].double())
    for key in ours:
        assert_no_worse_than([a.bfloat16() for a in ours[key]], [b.bfloat16() for b in stock[key]], exact[key], key)
