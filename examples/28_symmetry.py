"""Why must weights start at random?

Units that start equal get equal gradients and stay equal for ever: a wide layer of copies is one unit. Softmax
regression has no hidden units to tell apart, so a constant start is harmless there. Dropout alone breaks the tie.
"""

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

CASES = {
    "softmax regression, constant": ((), 0.0, True),
    "softmax regression, random": ((), 0.0, False),
    "MLP, constant": ((32,), 0.0, True),
    "MLP, constant, dropout": ((32,), 0.5, True),
    "MLP, random": ((32,), 0.0, False),
}


def main(out=None):
    data = digits()
    found = {}
    for name, (hidden, dropout, constant) in CASES.items():
        torch.manual_seed(0)
        model = MLP(64, hidden, 10, dropout=dropout, activation="tanh")
        if constant:
            for layer in model.layers:
                torch.nn.init.constant_(layer.weight, 0.1)
        fit(model, data.x, data.y, epochs=40, lr=5e-3)
        different = len(torch.unique(model.layers[0].weight.detach(), dim=0)) if hidden else None
        found[name] = {"accuracy": accuracy(model, data.x_test, data.y_test), "different": different}
        units = "" if different is None else f"; {different} different units of 32"
        print(f"{name:29} accuracy {found[name]['accuracy']:.3f}{units}")
    print("A constant start costs a linear model nothing, and a hidden layer all its units but one.")

    figure, panel = plt.subplots()
    panel.barh(list(found), [entry["accuracy"] for entry in found.values()])
    panel.invert_yaxis()
    panel.set(xlabel="test accuracy after 40 epochs", xlim=(0, 1))
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
