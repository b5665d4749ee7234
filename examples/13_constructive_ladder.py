"""How many layers does this table need?

Climb: a linear model first, then one hidden layer, then two, and keep a rung only if it gains more than one standard
error over the one kept so far. By hand below, on folds drawn once; `mlpkit.tune` chooses widths and encoding as well.
"""

import statistics

import torch
from common import COLOURS, fit, plt, save, start
from sklearn.datasets import load_diabetes, make_circles

from mlpkit.nn import MLP

RUNGS, FOLDS = [(), (32,), (32, 16)], 5


def tables():
    """Inputs and targets, standardised: a regression that is nearly linear, two classes that are not."""
    x, y = load_diabetes(return_X_y=True, scaled=True)
    rings, ring = make_circles(300, noise=0.1, factor=0.5, random_state=0)
    yield "diabetes", torch.tensor(x / x.std(0)), torch.tensor((y - y.mean()) / y.std())[:, None], "mse"
    yield "rings", torch.tensor(rings), torch.tensor(ring), "cross_entropy"


def score(model, x, y):
    """R2 of a regression, accuracy of a classification."""
    with torch.no_grad():
        guess = model.eval()(x)
    if y.is_floating_point():
        return 1 - ((guess - y).square().mean() / y.var(unbiased=False)).item()
    return (guess.argmax(1) == y).double().mean().item()


def main(out=None):
    found = {}
    figure, panels = plt.subplots(1, 2)
    for panel, (name, x, y, loss) in zip(panels, tables()):
        fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % FOLDS
        kept = None
        for layers, hidden in enumerate(RUNGS):
            scores = []
            for k in range(FOLDS):
                torch.manual_seed(k)
                model = MLP(x.shape[1], hidden, 1 if y.is_floating_point() else 2).double()
                fit(model, x[fold != k], y[fold != k], loss, epochs=40, lr=5e-3)
                scores.append(score(model, x[fold == k], y[fold == k]))
            panel.plot([layers] * FOLDS, scores, "o", alpha=0.7, color=COLOURS[layers])
            gains = [new - old for new, old in zip(scores, kept[1])] if kept else [1.0] * FOLDS
            gain, error = statistics.mean(gains), statistics.stdev(gains) / FOLDS**0.5
            earned = gain > error
            words = (
                "the baseline"
                if kept is None
                else f"gain {gain:+.3f} ± {error:.3f}: {'kept' if earned else 'not kept'}"
            )
            print(f"{name:8} hidden {hidden!s:8} score {statistics.mean(scores):.3f}, {words}")
            kept = (hidden, scores) if earned else kept
        found[name] = kept
        panel.set_xticks(range(3))
        panel.set(title=name, xlabel="hidden layers", ylabel="score of each fold")
        print(f"{name}: {len(kept[0])} hidden layers")
    save(figure, out)
    return {name: (hidden, statistics.mean(scores)) for name, (hidden, scores) in found.items()}


if __name__ == "__main__":
    start(main)
