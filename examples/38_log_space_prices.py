"""Prices: squared error, or squared error of the logarithm?

An error of 50,000 is nothing for a palace and everything for a hut. Prices spread over powers of ten, and people mean
relative error. In log space the cheap houses count too: judged by the median relative error, it wins.
"""

import torch
from common import fit, plt, save, start

from mlpkit.nn import MLP


def houses(rows, seed):
    """Made-up houses: the price is a product of area, location and age, with 10 % noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=g)
    log_price = 12 + 1.0 * x[:, 0] + 0.6 * x[:, 1].tanh() - 0.3 * x[:, 2].abs() + 0.1 * torch.randn(rows, generator=g)
    return x, log_price.exp()[:, None]


def main(out=None):
    x, y = houses(800, 0)
    x_test, y_test = houses(1000, 1)
    ways = {
        "price, standardised": (lambda p: (p - y.mean()) / y.std(), lambda z: z * y.std() + y.mean()),
        "logarithm of the price": (lambda p: p.log() - y.log().mean(), lambda z: (z + y.log().mean()).exp()),
    }
    found = {}
    figure, panels = plt.subplots(1, 2, sharey=True)
    for panel, (name, (encode, decode)) in zip(panels, ways.items()):
        torch.manual_seed(0)
        model = MLP(6, (32,), 1)
        fit(model, x, encode(y), "mse", epochs=40, lr=3e-3)
        with torch.no_grad():
            guess = decode(model(x_test))
        relative = ((guess - y_test) / y_test).abs()[:, 0]
        order = y_test[:, 0].argsort()
        found[name] = {
            "median": relative.median().item(),
            "cheap": relative[order[:250]].median().item(),
            "dear": relative[order[-250:]].median().item(),
            "negative": int((guess <= 0).sum()),
        }
        print(
            f"{name:22}: median relative error {found[name]['median']:.1%}, cheapest quarter "
            f"{found[name]['cheap']:.1%}, "
            f"dearest {found[name]['dear']:.1%}; prices below zero: {found[name]['negative']}"
        )
        panel.loglog(y_test[::3], guess[::3].clamp(min=1e3), ".", markersize=4)
        panel.loglog([4e3, 4e6], [4e3, 4e6], color="#7d8590", linewidth=1)
        panel.set(title=name, xlabel="price")
    panels[0].set_ylabel("predicted")
    save(figure, out)
    print('guard.TrainStep has the loss too: "log_mse", on raw positive prices.')
    return found


if __name__ == "__main__":
    start(main)
