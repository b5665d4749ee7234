"""A member in the words of the native part, and its first weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlpkit import init
from mlpkit.nn import MLP
from mlpkit.population.member import Member

_PRELU = 0.25  # as nn.PReLU starts


def network(member: Member, in_features: int, out_features: int) -> dict[str, Any]:
    """What the layout of the member's memory follows from."""
    return {
        "widths": [in_features, *member.hidden, out_features],
        "activation": member.activation,
        "norm": member.norm if member.norm and member.hidden else "none",
        "optimizer": member.optimizer,
        "with_momentum": member.momentum > 0,
        "bfloat16": member.precision == "bf16",
        "seed": member.seed,
    }


def recipe(member: Member) -> dict[str, Any]:
    """What may change between increments."""
    rmsprop = member.optimizer == "rmsprop"
    return {
        "dropout": list(member.rates),
        "lr": member.lr,
        "momentum": member.momentum,
        "beta1": member.betas[0],
        "beta2": member.alpha if rmsprop else member.betas[1],
        "eps": member.eps,
        "weight_decay": member.weight_decay,
        "l1": member.l1,
        "clip_norm": member.clip_norm or 0.0,
        "label_smoothing": member.label_smoothing,
        "min_delta": member.min_delta,
        "nesterov": member.nesterov,
        "batch_size": member.batch_size,
        "epochs": member.epochs,
        "patience": member.patience or 0,
        "schedule": member.schedule,
        "warmup": member.warmup,
        "floor": member.floor,
        "gamma": member.gamma,
        "every": member.every,
    }


def draw(member: Member, tensors: dict[str, Tensor]) -> None:
    """Fill a new member's tensors as a new ``nn.MLP`` is filled, drawing from the member's seed."""
    generator = torch.Generator().manual_seed(member.seed)
    rule = getattr(init, member.init)
    for name, tensor in tensors.items():
        if name.endswith(".slope") or (name.startswith("blocks.") and name.endswith(".1.weight")):
            tensor.fill_(_PRELU)
        elif tensor.dim() == 2:
            drawn = torch.empty(tensor.shape)  # in the order of its rows, however the member's memory is laid out
            tensor.copy_(rule(drawn, generator=generator))
        elif name.endswith((".0.weight", "running_var")):
            tensor.fill_(1.0)


def module(member: Member, tensors: dict[str, Tensor], in_features: int, out_features: int) -> MLP:
    """A new ``nn.MLP`` in eval mode with copies of these tensors."""
    with torch.random.fork_rng(devices=[]):  # its own first draws are for nothing
        model = MLP(
            in_features,
            tuple(member.hidden),
            out_features,
            activation=member.activation,
            dropout=member.rates,
            norm=member.norm,
            init=member.init,
        )
    model.load_state_dict(model.state_dict() | tensors)
    return model.eval()
