"""Can cross-validation be fooled?

Its estimate for one model is honest. The best of many is not: choose among settings by their k-fold score and the
winner's score is lucky. Here all inputs are noise, so no setting can beat 50 %, and yet the best one seems to.
"""

import statistics

import torch
from common import GREY, plt, save, start

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP

ROWS, FOLDS, SETTINGS = 60, 5, 30


def score(hidden, lr, seed, train, test):
    torch.manual_seed(seed)
    model = MLP(20, (hidden,), 2)
    step = TrainStep(model, "cross_entropy", torch.optim.Adam(model.parameters(), lr=lr))
    for _ in range(30):
        step(*train)
    with torch.no_grad():
        return (model(test[0]).argmax(1) == test[1]).float().mean().item()


def main(out=None):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(ROWS, 20, generator=generator), torch.randint(2, (ROWS,), generator=generator)
    fresh = torch.randn(2000, 20, generator=generator), torch.randint(2, (2000,), generator=generator)
    fold_of_row = torch.arange(ROWS) % FOLDS
    means, honest = [], []
    for index in range(SETTINGS):
        hidden, lr = 4 + 4 * (index % 10), 10 ** (-3 + index // 10)
        parts = [
            ((x[fold_of_row != k], y[fold_of_row != k]), (x[fold_of_row == k], y[fold_of_row == k]))
            for k in range(FOLDS)
        ]
        means.append(statistics.mean(score(hidden, lr, index, train, test) for train, test in parts))
        honest.append(score(hidden, lr, index, (x, y), fresh))
    best = max(range(SETTINGS), key=lambda i: means[i])
    found = {"best": means[best], "mean": statistics.mean(means), "fresh": honest[best]}
    print(
        f"{SETTINGS} settings on pure noise: {FOLDS}-fold accuracy {found['mean']:.3f} on average, "
        f"{found['best']:.3f} for the best"
    )
    print(
        f"that best one on 2000 fresh rows: {found['fresh']:.3f}; the {found['best'] - found['fresh']:.3f} "
        f"between is the price of choosing"
    )
    print("Report a winner on rows that took no part in choosing it.")

    figure, panel = plt.subplots()
    panel.scatter(means, honest)
    panel.scatter(means[best : best + 1], honest[best : best + 1], s=90, label="chosen")
    panel.axhline(0.5, color=GREY, linestyle=":")
    panel.set(xlabel="5-fold accuracy", ylabel="accuracy on fresh rows", ylim=(0.3, 0.7))
    panel.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
