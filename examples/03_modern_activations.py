"""Which activation is best?

On a shallow network the modern ones differ by less than two seeds of one of them do. What matters is to avoid a deep
stack of sigmoids: its gradient is divided by four or more in every layer, and it does not start to learn.
"""

import statistics

import torch
from common import GREY, accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

SHALLOW = ["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"]


def scores(activation, hidden, seeds, data):
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = MLP(64, hidden, 10, activation=activation)
        fit(model, data.x, data.y, epochs=25, lr=2e-3)
        yield accuracy(model, data.x_test, data.y_test)


def main(out=None):
    data = digits(600)
    found = {}
    for name, hidden in [*((name, (64, 64)) for name in SHALLOW), ("relu", (64,) * 12), ("sigmoid", (64,) * 12)]:
        label = name if len(hidden) == 2 else f"{name}, 12 layers"
        found[label] = list(scores(name, hidden, 5, data))
        mean, spread = statistics.mean(found[label]), statistics.stdev(found[label])
        print(f"{label:20} accuracy {mean:.3f}, seeds differ by {spread:.3f} (standard deviation)")

    modern = [statistics.mean(found[name]) for name in ("relu", "leaky_relu", "gelu", "silu")]
    found["range"] = max(modern) - min(modern)
    found["seeds"] = max(max(found[name]) - min(found[name]) for name in ("relu", "leaky_relu", "gelu", "silu"))
    print(f"relu, leaky_relu, gelu, silu: means within {found['range']:.3f}; seeds of one within {found['seeds']:.3f}")
    print("The choice among modern activations is noise here; sigmoids in a deep stack are not.")

    figure, panel = plt.subplots()
    for place, name in enumerate(label for label in found if isinstance(found[label], list)):
        panel.plot([place] * 5, found[name], "o", alpha=0.7)
    names = [label for label in found if isinstance(found[label], list)]
    panel.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize="small")
    panel.axhline(0.1, color=GREY, linestyle=":", label="guessing")
    panel.set(ylabel="test accuracy, 5 seeds")
    panel.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
