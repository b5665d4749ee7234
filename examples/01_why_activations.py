"""Why does a network need activations?

A stack of linear layers is one linear layer: the product of its matrices. It separates what a line separates, at any
depth. An activation in between bends the line. Below: the same stack with and without, on two rings.
"""

import torch
from common import accuracy, fit, plt, save, start
from sklearn.datasets import make_circles

from mlpkit.functional import linear_act_dropout
from mlpkit.nn import MLP

NAMES = ["identity", "relu", "leaky_relu", "prelu", "gelu", "silu", "sigmoid", "tanh"]


def slopes(name, z):
    """Value and slope of an activation: the fused layer with weight 1, differentiated by autograd."""
    x = z.clone().requires_grad_()
    slope = {"leaky_relu": 0.1, "prelu": torch.tensor([0.25])}.get(name)
    value = linear_act_dropout(x[:, None], torch.ones(1, 1), activation=name, slope=slope)[:, 0]
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def main(out=None):
    x, y = make_circles(600, noise=0.08, factor=0.5, random_state=0)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    found = {}
    for activation in ("identity", "relu"):
        torch.manual_seed(0)
        model = MLP(2, (16, 16, 16), 2, activation=activation)
        fit(model, x[:400], y[:400], epochs=60, lr=1e-2)
        found[activation] = accuracy(model, x[400:], y[400:])
        print(f"four layers with {activation:8}: accuracy {found[activation]:.2f} on the rings")
        if activation == "identity":
            weight = torch.linalg.multi_dot([layer.weight for layer in reversed(model.layers)])
            with torch.no_grad():
                shift = model(torch.zeros(1, 2))
                found["collapse"] = (model(x) - (x @ weight.T + shift)).abs().max().item()
            print(
                f"  its four matrices multiply to one of {tuple(weight.shape)}: outputs differ by "
                f"{found['collapse']:.0e}"
            )

    z = torch.linspace(-4, 4, 401)
    figure, (left, right) = plt.subplots(1, 2)
    for name in NAMES:
        value, slope = slopes(name, z)
        found[f"slope of {name}"] = slope.abs().max().item()
        style = "--" if name in NAMES[6:] else "-"
        left.plot(z, value, style, label=name)
        right.plot(z, slope, style)
    left.set(title="activation", xlabel="z", ylim=(-1.5, 3))
    left.legend(fontsize="x-small", loc="upper left")
    right.set(title="its slope", xlabel="z", ylim=(-0.2, 1.3))
    save(figure, out)
    print(f"largest slopes: sigmoid {found['slope of sigmoid']:.2f}, tanh {found['slope of tanh']:.2f}, relu 1.00")

    found["identity error"] = (torch.tanh(z) + 1 - 2 * torch.sigmoid(2 * z)).abs().max().item()
    print(f"tanh(z) + 1 = 2 sigmoid(2z): largest difference {found['identity error']:.0e}")
    return found


if __name__ == "__main__":
    start(main)
