"""What does layer-wise scaling (LARS) buy?

One learning rate must serve layers whose weights and gradients differ in size by orders. LARS makes each step a fixed
share of the layer's own norm. Here one layer starts a hundred times too large: SGD has to pick, LARS need not.
"""

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.guard.optim import LARS
from mlpkit.nn import MLP

RATES = [3e-6, 3e-5, 3e-4, 3e-3, 3e-2, 0.3, 3.0]


def build():
    """Function-preserving: ReLU passes a factor through, so 100 in the first layer and 1/100 in the second cancel."""
    torch.manual_seed(0)
    model = MLP(64, (64, 64), 10, init="he_normal")
    with torch.no_grad():
        model.layers[0].weight.mul_(100)
        model.layers[1].weight.div_(100)
    return model


def main(out=None):
    data = digits()
    found = {"SGD": [], "LARS": []}
    for name in found:
        for lr in RATES:
            model = build()
            make = {
                "SGD": lambda p, lr=lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
                "LARS": lambda p, lr=lr: LARS(p, lr=lr, momentum=0.9, trust=0.01),
            }[name]
            fit(model, data.x, data.y, epochs=15, batch_size=256, optimizer=make(model.parameters()))
            found[name].append(accuracy(model, data.x_test, data.y_test))
        print(f"{name:4} " + ", ".join(f"lr {lr}: {value:.3f}" for lr, value in zip(RATES, found[name])))
    best = {name: max(values) for name, values in found.items()}
    print(f"best of these rates: SGD {best['SGD']:.3f}, LARS {best['LARS']:.3f}")

    figure, panel = plt.subplots()
    for name, values in found.items():
        panel.semilogx(RATES, values, "o-", label=name)
    panel.set(xlabel="learning rate", ylabel="test accuracy after 15 epochs", ylim=(0, 1))
    panel.legend()
    save(figure, out)
    return {"best": best, **found}


if __name__ == "__main__":
    start(main)
