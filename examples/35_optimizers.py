"""SGD, RMSprop or Adam?

Each at its own best of the same six learning rates, because an optimizer without its rate is no contender. On an easy
table they end close to each other; what differs is how wide the range of rates is that works.
"""

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

RATES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "SGD, momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
}


def main(out=None):
    data = digits()
    found = {}
    figure, (left, right) = plt.subplots(1, 2)
    for name, make in OPTIMIZERS.items():
        scores, curves = [], []
        for lr in RATES:
            torch.manual_seed(0)
            model = MLP(64, (64,), 10)
            curves.append(fit(model, data.x, data.y, epochs=12, optimizer=make(model.parameters(), lr)))
            scores.append(accuracy(model, data.x_test, data.y_test))
        best = max(range(len(RATES)), key=lambda i: scores[i])
        found[name] = {"best": scores[best], "lr": RATES[best], "good": sum(score > 0.9 for score in scores)}
        print(
            f"{name:13} best {scores[best]:.3f} at {RATES[best]}; {found[name]['good']} of 6 rates give more than 0.9"
        )
        left.semilogx(RATES, scores, "o-", label=name)
        right.semilogy(curves[best], label=f"{RATES[best]}")
    left.set(xlabel="learning rate", ylabel="test accuracy after 12 epochs", ylim=(0, 1))
    left.legend(fontsize="small")
    right.set(xlabel="epoch", ylabel="loss at its best rate")
    save(figure, out)
    bests = [entry["best"] for entry in found.values()]
    print(
        f"At their best rates they lie within {max(bests) - min(bests):.3f} of each other; the rate matters "
        f"more than the name."
    )
    return {"range": max(bests) - min(bests), **found}


if __name__ == "__main__":
    start(main)
