"""Where should dropout be strongest?

Two hidden layers, probabilities 0.2 then 0.5, and swapped. Dropping early takes information that no later layer can
bring back; how much that costs, the run says. And dropout tolerates, even wants, a higher learning rate.
"""

import statistics

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

RATES = [1e-3, 3e-3, 1e-2]
CASES = {"none": (0.0, 0.0), "0.2 then 0.5": (0.2, 0.5), "0.5 then 0.2": (0.5, 0.2), "0.2 then 0.8": (0.2, 0.8),
         "0.8 then 0.2": (0.8, 0.2)}  # fmt: skip


def main(out=None):
    data = digits(400)
    found = {}
    for name, dropout in CASES.items():
        for lr in RATES:
            scores = []
            for seed in range(4):
                torch.manual_seed(seed)
                model = MLP(64, (64, 64), 10, dropout=dropout)
                fit(model, data.x, data.y, epochs=25, lr=lr)
                scores.append(accuracy(model, data.x_test, data.y_test))
            found[name, lr] = statistics.mean(scores)
        best = max(RATES, key=lambda lr: found[name, lr])
        found[name] = best
        print(f"{name:13} " + "  ".join(f"lr {lr}: {found[name, lr]:.3f}" for lr in RATES) + f"  best at {best}")
    swap = {
        p: found[f"0.2 then {p}", found[f"0.2 then {p}"]] - found[f"{p} then 0.2", found[f"{p} then 0.2"]]
        for p in (0.5, 0.8)
    }
    print(f"Swapping costs {swap[0.5]:+.3f} at 0.5 and {swap[0.8]:+.3f} at 0.8 of accuracy, each at its best rate.")
    gain = {name: found[name, 1e-2] - found[name, 1e-3] for name in CASES}
    print(
        f"Ten times the learning rate gains {gain['none']:+.3f} without dropout, {gain['0.8 then 0.2']:+.3f} "
        f"with most of it."
    )

    figure, panel = plt.subplots()
    for name in CASES:
        panel.semilogx(RATES, [found[name, lr] for lr in RATES], "o-", label=name)
    panel.set(xlabel="learning rate", ylabel="test accuracy, mean of 4 seeds")
    panel.legend(fontsize="small", title="dropout", title_fontsize="small")
    save(figure, out)
    return {"swap": swap, "gain": gain}


if __name__ == "__main__":
    start(main)
