"""What the tests of populations share: small tables, unequal members, a member's state, the order of its rows."""

from __future__ import annotations

import itertools

import torch

from mlpkit._ext import _C
from mlpkit.population import Member, Population

SHUFFLE_STREAM = 0xFFFFFFFF


def numbers_table(rows=70, columns=6, outputs=1, seed=0):
    """X and a smooth target with some noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, outputs, generator=generator)
    return x, torch.tanh(x @ mix) + 0.1 * torch.randn(rows, outputs, generator=generator)


def classes_table(rows=70, columns=6, classes=3, seed=0):
    """X and classes that are not linear in it."""
    x, scores = numbers_table(rows, columns, classes, seed)
    return x, (scores + 0.5 * (x[:, :1] * x[:, 1:2])).argmax(1)


def every_kind(**common):
    """Members of every optimizer, norm, dropout and precision, each with its own widths, batches and seed."""
    kinds = itertools.product(
        ("sgd", "adam", "adamw", "rmsprop"), (None, "batch", "layer"), (0.0, 0.3), ("fp32", "bf16")
    )
    return [
        Member(
            **(
                {
                    "hidden": ((), (13,), (17, 3), (33, 40), (1,), (8, 8, 8))[index % 6],
                    "activation": ("relu", "gelu", "tanh", "prelu", "leaky_relu")[index % 5],
                    "dropout": dropout,
                    "norm": norm,
                    "optimizer": optimizer,
                    "momentum": 0.9 if optimizer == "sgd" and index % 2 else 0.0,
                    "precision": precision,
                    "lr": 1e-2 / (1 + index % 4),
                    "weight_decay": 1e-3 * (index % 3),
                    "l1": 1e-4 * (index % 2),
                    "batch_size": (7, 16, 40)[index % 3],
                    "schedule": ("constant", "cosine", "step", "exponential", "one_cycle")[index % 5],
                    "epochs": 3,
                    "seed": 100 + index,
                }
                | common
            )
        )
        for index, (optimizer, norm, dropout, precision) in enumerate(kinds)
    ]


def population(members, table, **settings):
    """A silent population on one thread."""
    X, y = table
    settings = {"loss": "mse" if y.is_floating_point() else "cross_entropy", "threads": 1, "progress": False} | settings
    return Population(members, X, y, **settings)


def state(trained, index):
    """A copy of everything that a member has learnt and remembers, with its curves."""
    curves = trained.scores[index]
    return [trained._native.state(index).clone(), torch.tensor([curves.train_loss, curves.validation_loss]).double()]


def assert_same_bits(ours, theirs, name):
    """Whether two states agree in every bit, NaN included."""
    for a, b in zip(ours, theirs, strict=True):
        kind = torch.int32 if a.dtype == torch.float32 else torch.int64
        assert torch.equal(a.view(kind), b.view(kind)), name


def moments(trained, index):
    """Views of a member's parameters, and of their first and second moments (None where there are none)."""
    member, tensors = trained.members[index], trained._native.tensors(index, False)
    flat = trained._native.state(index)
    parameters = {key: value for key, value in tensors.items() if "running" not in key}
    size = max((one.storage_offset() + one.numel() + 15) // 16 * 16 for one in parameters.values())

    def part(number):
        return {
            key: flat.as_strided(one.shape, one.stride(), number * size + one.storage_offset())
            for key, one in parameters.items()
        }

    first = member.optimizer in ("adam", "adamw") or member.momentum > 0
    second = member.optimizer != "sgd"
    return tensors, part(1) if first else None, part(2 if first else 1) if second else None


def order(seed, epoch, rows):
    """The order of an epoch's rows, by the words of core/shuffle.h."""
    found = list(range(rows))
    for n in range(rows - 1):
        counter = [n // 128, n % 128 // 4, epoch, SHUFFLE_STREAM]
        word = _C.philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32])[n % 4]
        last = rows - 1 - n
        other = word * (last + 1) >> 32
        found[last], found[other] = found[other], found[last]
    return found
