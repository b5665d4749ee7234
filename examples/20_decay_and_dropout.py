"""Do weight decay and dropout add up?

Four networks on few, noisy labels: neither, either and both. If their gains were additive, both together would gain
the sum. Here they gain less than that: what one has prevented the other cannot prevent again.
"""

import statistics

import torch
from common import GREY, accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

CASES = {"neither": (0.0, 0.0), "decay": (0.3, 0.0), "dropout": (0.0, 0.5), "both": (0.3, 0.5)}


def main(out=None):
    data = digits(300)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(300, generator=generator) < 0.2
    y = torch.where(wrong, torch.randint(10, (300,), generator=generator), data.y)
    found = {}
    for name, (decay, dropout) in CASES.items():
        found[name] = []
        for seed in range(5):
            torch.manual_seed(seed)
            model = MLP(64, (256,), 10, dropout=dropout)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay)
            fit(model, data.x, y, epochs=60, optimizer=optimizer)
            found[name].append(accuracy(model, data.x_test, data.y_test))
        print(f"{name:8} accuracy {statistics.mean(found[name]):.3f} ± {statistics.stdev(found[name]):.3f} over seeds")
    base = statistics.mean(found["neither"])
    gains = {name: statistics.mean(found[name]) - base for name in ("decay", "dropout", "both")}
    total = gains["decay"] + gains["dropout"]
    print(
        f"gains: decay {gains['decay']:+.3f}, dropout {gains['dropout']:+.3f}, sum {total:+.3f}, both "
        f"{gains['both']:+.3f}"
    )
    print("Diminishing: both together gain less than the sum." if gains["both"] < total else "Additive or more.")

    figure, panel = plt.subplots()
    for place, scores in enumerate(found.values()):
        panel.plot([place] * 5, scores, "o", alpha=0.7)
    panel.axhline(base + total, color=GREY, linestyle="--", label="if the gains added up")
    panel.set_xticks(range(4), CASES)
    panel.set(ylabel="test accuracy, 5 seeds")
    panel.legend()
    save(figure, out)
    return {"scores": found, "gains": gains}


if __name__ == "__main__":
    start(main)
