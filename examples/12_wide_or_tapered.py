"""Wide, deep or tapered, at the same number of parameters?

One wide layer, two equal ones, a funnel and a reversed funnel, each sized to about 6,000 parameters. Differences are
to be read against the spread of the seeds.
"""

import statistics

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

SHAPES = {"wide": (80,), "equal": (47, 47), "tapered": (64, 24), "reversed": (36, 78), "deep": (38, 38, 38)}


def main(out=None):
    data = digits(400)
    found = {}
    for name, hidden in SHAPES.items():
        scores = []
        for seed in range(5):
            torch.manual_seed(seed)
            model = MLP(64, hidden, 10, init="he_normal")
            fit(model, data.x, data.y, epochs=60, lr=3e-3)
            scores.append(accuracy(model, data.x_test, data.y_test))
        found[name] = {"scores": scores, "parameters": sum(p.numel() for p in model.parameters())}
        print(
            f"{name:8} {hidden!s:13} {found[name]['parameters']} parameters: accuracy {statistics.mean(scores):.3f}, "
            f"seeds differ by {statistics.stdev(scores):.3f}"
        )
    means = {name: statistics.mean(entry["scores"]) for name, entry in found.items()}
    gap = max(means.values()) - min(means.values())
    print(f"Best and worst shape are {gap:.3f} apart: at equal size the shape hardly matters on this table.")

    figure, panel = plt.subplots()
    for place, (name, entry) in enumerate(found.items()):
        panel.plot([place] * 5, entry["scores"], "o", alpha=0.6)
        panel.plot([place - 0.2, place + 0.2], [means[name]] * 2, color="#7d8590")
    panel.set_xticks(range(len(found)), [f"{name}\n{SHAPES[name]}" for name in found])
    panel.set(ylabel="test accuracy, 5 seeds and mean")
    save(figure, out)
    return {"gap": gap, **found}


if __name__ == "__main__":
    start(main)
