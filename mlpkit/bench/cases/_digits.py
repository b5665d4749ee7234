"""Whole fits of scikit-learn's digits: a fold of 1,437 rows trained on, 360 validated after every epoch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mlpkit import nn

P, DECAY = 0.1, 1e-4


class Digits:
    """One fit of every shape, by each of the rivals."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], epochs: int, batch: int, rate: float) -> None:
        from sklearn.datasets import load_digits

        self.shapes, self.epochs, self.batch, self.rate = shapes, epochs, batch, rate
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        self.x = torch.tensor(data.data / 16, dtype=torch.float32)
        self.y = torch.tensor(data.target)
        self.train, self.rest = order[360:], order[:360]

    def ours(self) -> None:
        """One population."""
        from mlpkit.population import Member, Population

        settings: dict[str, Any] = {
            "dropout": P, "optimizer": "adamw", "lr": self.rate, "weight_decay": DECAY, "batch_size": self.batch,
            "epochs": self.epochs, "rows": self.train, "validation_rows": self.rest,
        }  # fmt: skip
        members = [Member(hidden=hidden, **settings) for hidden in self.shapes]
        Population(members, self.x, self.y, loss="cross_entropy", metric="accuracy", progress=False).fit()

    def loader(self) -> None:
        """The usual loop: DataLoader, AdamW, a validation pass after every epoch."""
        table = TensorDataset(self.x[self.train], self.y[self.train])
        for hidden in self.shapes:
            model = nn.MLP(64, hidden, 10, dropout=P).to_sequential()
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=DECAY)
            for _ in range(self.epochs):
                model.train()
                for x, y in DataLoader(table, batch_size=self.batch, shuffle=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                model.eval()
                with torch.inference_mode():
                    (model(self.x[self.rest]).argmax(1) == self.y[self.rest]).double().mean().item()

    def sklearn(self) -> None:
        """``MLPClassifier`` with as many epochs."""
        from sklearn.neural_network import MLPClassifier

        x, y = self.x[self.train].numpy(), self.y[self.train].numpy()
        for hidden in self.shapes:
            model = MLPClassifier(
                hidden, alpha=DECAY, batch_size=self.batch, learning_rate_init=self.rate, max_iter=self.epochs,
                n_iter_no_change=self.epochs + 1, random_state=0,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that it did not converge
                model.fit(x, y)
