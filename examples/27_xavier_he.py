"""Where do Xavier's and He's formulas come from?

Var(sum of n products) = n Var(w) E[x^2]. To keep it: Var(w) = 1/n forward, 1/n_out backward; Xavier takes the mean of
both, He doubles 1/n because ReLU keeps half of E[x^2]. Uniform and normal draws of one variance do the same. Measured.
"""

import torch
from common import plt, save, start

from mlpkit import init
from mlpkit.nn import MLP

SCHEMES = ["xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "normal"]


def main(out=None):
    fan_in, fan_out = 400, 100
    found = {"variance": {}, "signal": {}}
    derived = {"xavier": 2 / (fan_in + fan_out), "he": 2 / fan_in, "normal": 0.01**2}
    for scheme in SCHEMES:
        torch.manual_seed(0)
        weight = torch.empty(fan_out, fan_in)
        getattr(init, scheme)(weight)
        ratio = weight.var().item() / derived[scheme.split("_")[0]]
        found["variance"][scheme] = ratio
        print(f"{scheme:14} variance of a weight: measured {weight.var():.3e}, {ratio:.3f} of the derived one")

    figure, panels = plt.subplots(1, 2, sharey=True)
    x = torch.randn(500, 100)
    for panel, activation in zip(panels, ("relu", "tanh")):
        for scheme in SCHEMES:
            torch.manual_seed(0)
            layers = init.check(MLP(100, (100,) * 15, 10, activation=activation, init=scheme), x).layers[:-1]
            variances = [layer.forward_variance for layer in layers]
            found["signal"][activation, scheme] = variances[-1] / variances[0]
            panel.semilogy(range(1, 16), variances, label=scheme)
        panel.set(title=activation, xlabel="hidden layer", ylim=(1e-12, 1e1))
    panels[0].set_ylabel("variance of the output")
    panels[0].legend(fontsize="small")
    save(figure, out)
    for activation in ("relu", "tanh"):
        he, xavier = (found["signal"][activation, f"{name}_normal"] for name in ("he", "xavier"))
        uniform = found["signal"][activation, "he_uniform"]
        print(
            f"{activation}: variance after 15 layers over the first: he_normal {he:.2g} (uniform "
            f"{uniform:.2g}), xavier_normal {xavier:.2g}"
        )
    print("Through fifteen ReLU layers He's start keeps the signal, Xavier's halves it each layer, std 0.01 loses it.")
    return found


if __name__ == "__main__":
    start(main)
