"""What function is a ReLU network?

Piecewise linear. Between two kinks the slope is constant; a kink is where a unit switches on or off. One hidden layer
of n units on one input has at most n kinks; a second layer can fold what the first one made.
"""

import torch
from common import GREY, fit, plt, save, start

from mlpkit.nn import MLP


def kinks(model, x):
    """Places where the slope changes, from the pattern of units that are on along a fine grid."""
    with torch.no_grad():
        patterns, values = [], x
        for layer in model.layers[:-1]:
            values = layer(values)
            patterns.append(values > 0)
        on = torch.cat(patterns, 1)
    return ((on[1:] != on[:-1]).any(1)).nonzero()[:, 0]


def main(out=None):
    x = torch.linspace(-3, 3, 20_001, dtype=torch.float64)[:, None]
    target = torch.sin(2 * x)
    found = {}
    figure, panels = plt.subplots(1, 2, sharey=True)
    for panel, hidden in zip(panels, [(8,), (8, 8)]):
        torch.manual_seed(1)
        model = MLP(1, hidden, 1, init="he_normal").double()
        for layer in model.layers[:-1]:
            torch.nn.init.uniform_(layer.bias, -2, 2)
        fit(model, x[::100], target[::100], "mse", epochs=150, lr=1e-2)
        places = kinks(model, x)
        with torch.no_grad():
            y = model(x)
        # Between kinks the second difference of a line is rounding; at a kink it is the step of the slope.
        bend = (y[2:] - 2 * y[1:-1] + y[:-2]).abs()[:, 0]
        near = torch.zeros(len(x), dtype=torch.bool)
        near[places] = near[places + 1] = True
        found[hidden] = {
            "kinks": len(places),
            "off": bend[~near[1:-1]].max().item(),
            "at": bend[near[1:-1]].max().item(),
        }
        print(
            f"hidden {hidden}: {len(places)} kinks on [-3, 3]; largest second difference "
            f"{found[hidden]['off']:.0e} between kinks, {found[hidden]['at']:.0e} at them"
        )
        panel.plot(x[::20], target[::20], color=GREY, linestyle="--", label="sin 2x")
        panel.plot(x[::20], y[::20], label="network")
        panel.plot(x[places], y[places], "o", markersize=4, label="kinks")
        panel.set(title=f"hidden {hidden}: {len(places)} kinks", xlabel="x")
    panels[0].legend(loc="upper center", ncols=3, fontsize="small")
    panels[0].set_ylim(-1.5, 1.9)
    save(figure, out)
    print("A ReLU network joins straight pieces: away from its kinks its second difference is rounding alone.")
    return found


if __name__ == "__main__":
    start(main)
