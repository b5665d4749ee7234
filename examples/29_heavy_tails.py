"""Does only the variance of the start matter?

Weights from a uniform, a normal, a Laplace and a Student t distribution (3 degrees of freedom: heavy tails), all
scaled to He's variance. If the variance were all, they would send the same signal forward and learn alike.
"""

import statistics

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

DRAWS = {
    "uniform": lambda shape: (torch.rand(shape) - 0.5) * 12**0.5,
    "normal": torch.randn,
    "Laplace": lambda shape: torch.distributions.Laplace(0.0, 2**-0.5).sample(shape),
    "Student t(3)": lambda shape: torch.distributions.StudentT(3.0).sample(shape) / 3**0.5,
}


def main(out=None):
    data = digits(600)
    found = {}
    for name, draw in DRAWS.items():
        scores, largest = [], []
        for seed in range(5):
            torch.manual_seed(seed)
            model = MLP(64, (64, 64, 64), 10)
            with torch.no_grad():
                for layer in model.layers:
                    layer.weight.copy_(draw(layer.weight.shape) * (2 / layer.weight.shape[1]) ** 0.5)
            weight = model.layers[1].weight
            largest.append((weight.abs().max() / (2 / 64) ** 0.5).item())
            fit(model, data.x, data.y, epochs=15, lr=2e-3)
            scores.append(accuracy(model, data.x_test, data.y_test))
        found[name] = {"scores": scores, "mean": statistics.mean(scores), "largest": statistics.mean(largest)}
        print(
            f"{name:13} largest weight {found[name]['largest']:4.1f} standard deviations; accuracy "
            f"{found[name]['mean']:.3f}, seeds differ by {statistics.stdev(scores):.3f}"
        )
    means = [entry["mean"] for entry in found.values()]
    print(f"The means lie within {max(means) - min(means):.3f}: at equal variance the tails hardly show here.")

    figure, panel = plt.subplots()
    for place, entry in enumerate(found.values()):
        panel.plot([place] * 5, entry["scores"], "o", alpha=0.7)
    panel.set_xticks(range(4), [f"{name}\nmax {entry['largest']:.0f} sd" for name, entry in found.items()])
    panel.set(ylabel="test accuracy, 5 seeds", ylim=(0.85, 1))
    save(figure, out)
    return {"range": max(means) - min(means), **found}


if __name__ == "__main__":
    start(main)
