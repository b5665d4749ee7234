"""Does dropout help a network that is too large, and is it alone in that?

Hidden 64, then 128 with dropout 0.5, then 128 with 0.1; beside them DropConnect, which drops weights, and Gaussian
noise on the inputs. Two hundred training rows, three seeds, with clean labels and with a fifth of them wrong.
"""

import statistics

import torch
from common import INK, accuracy, digits, fit, plt, save, start
from torch import nn

from mlpkit.nn import MLP, DropConnect, GaussianNoise

MODELS = {
    "64": lambda: MLP(64, (64,), 10),
    "128": lambda: MLP(64, (128,), 10),
    "128, dropout 0.5": lambda: MLP(64, (128,), 10, dropout=0.5),
    "128, dropout 0.1": lambda: MLP(64, (128,), 10, dropout=0.1),
    "128, DropConnect 0.5": lambda: nn.Sequential(
        DropConnect(64, 128, weight_dropout=0.5, activation="relu"), nn.Linear(128, 10)
    ),
    "128, noise 0.3": lambda: nn.Sequential(GaussianNoise(0.3), MLP(64, (128,), 10)),
}


def main(out=None):
    data = digits(200)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(200, generator=generator) < 0.2
    targets = {
        "clean": data.y,
        "20 % wrong": torch.where(wrong, torch.randint(10, (200,), generator=generator), data.y),
    }
    found = {}
    for labels, y in targets.items():
        for name, make in MODELS.items():
            scores = []
            for seed in range(3):
                torch.manual_seed(seed)
                model = make()
                fit(model, data.x, y, epochs=50, lr=3e-3)
                scores.append(accuracy(model, data.x_test, data.y_test))
            found[labels, name] = mean, spread = statistics.mean(scores), statistics.stdev(scores)
            print(f"labels {labels}: {name:21} test accuracy {mean:.3f} ± {spread:.3f}")
    for labels in targets:
        best = max(MODELS, key=lambda name: found[labels, name][0])
        found[labels] = best, found[labels, best][0] - found[labels, "128"][0]
        print(f"labels {labels}: best is {best}, {found[labels][1]:+.3f} against 128 without noise")
    print("Noise pays where there is something wrong to learn by heart; on clean digits it has nothing to prevent.")

    figure, panels = plt.subplots(1, 2, sharey=True)
    for panel, labels in zip(panels, targets):
        means, spreads = zip(*(found[labels, name] for name in MODELS))
        panel.barh(list(MODELS), means, xerr=spreads, ecolor=INK)
        panel.set(title=f"labels {labels}", xlabel="test accuracy", xlim=(min(means) - 0.03, max(means) + 0.02))
    panels[0].invert_yaxis()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
