"""Why does random search beat a grid?

Sixteen trials on a 4 x 4 grid try four learning rates; sixteen random ones try sixteen. Where one setting matters and
another hardly does, the grid spends most of its trials on the one that does not.
"""

import torch
from common import GREY, digits, fit, loss_of, plt, save, start

from mlpkit.nn import MLP

BOUNDS = {"lr": (-4.0, 0.0), "decay": (-6.0, -2.0)}  # powers of ten


def score(lr, decay, data):
    torch.manual_seed(0)
    model = MLP(64, (32,), 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=10**lr, weight_decay=10**decay)
    fit(model, data.x, data.y, epochs=4, optimizer=optimizer)
    return loss_of(model, data.x_test, data.y_test)


def main(out=None):
    data = digits(400)
    (low, high), (low2, high2) = BOUNDS.values()
    grid = [(a, b) for a in torch.linspace(low, high, 4).tolist() for b in torch.linspace(low2, high2, 4).tolist()]
    found = {"grid": {"points": grid, "losses": [score(*point, data) for point in grid]}}
    bests = []
    for seed in range(5):
        draws = torch.rand(16, 2, generator=torch.Generator().manual_seed(seed)).tolist()
        points = [(low + (high - low) * a, low2 + (high2 - low2) * b) for a, b in draws]
        losses = [score(*point, data) for point in points]
        bests.append(min(losses))
        if seed == 1:
            found["random"] = {"points": points, "losses": losses}
    found["best"] = {"grid": min(found["grid"]["losses"]), "random": sorted(bests)}
    for name in ("grid", "random"):
        found[name]["unique"] = len({round(lr, 6) for lr, _ in found[name]["points"]})
        print(f"{name}: 16 trials, {found[name]['unique']} values of the learning rate")
    better = sum(best < found["best"]["grid"] for best in bests)
    print(
        f"best loss of the grid {found['best']['grid']:.3f}; random draws: "
        f"{', '.join(f'{b:.3f}' for b in sorted(bests))}"
    )
    print(f"Random search found a better one in {better} of 5 draws of 16.")

    figure, panels = plt.subplots(1, 2, sharey=True)
    every = found["grid"]["losses"] + found["random"]["losses"]
    colours = {"cmap": "viridis_r", "norm": "log", "vmin": min(every), "vmax": max(every), "edgecolors": GREY}
    for panel, name in zip(panels, ("grid", "random")):
        lrs, decays = zip(*found[name]["points"])
        dots = panel.scatter(lrs, decays, c=found[name]["losses"], **colours)
        panel.plot(lrs, [low2 - 0.5] * 16, "|", color=GREY, markersize=12)
        panel.set(title=f"{name}: {found[name]['unique']} learning rates", xlabel="log10 of the learning rate")
    panels[0].set_ylabel("log10 of the weight decay")
    figure.colorbar(dots, label="test loss")
    save(figure, out)
    found["better"] = better
    return found


if __name__ == "__main__":
    start(main)
