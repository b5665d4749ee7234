"""Why do gradients vanish or explode?

A gradient is a product over layers. A sigmoid's slope is at most 1/4, so twenty of them divide by 4^20 or more; a
product of a hundred random matrices grows or shrinks like a power of their size. The start decides which.
"""

import torch
from common import plt, save, start

from mlpkit import init
from mlpkit.nn import MLP

DEPTHS = [2, 5, 10, 20, 40]


def first_over_last(activation, scheme, depth):
    """Size of the gradient at the first layer over that at the last hidden one, from noise at the output."""
    torch.manual_seed(0)
    model = MLP(64, (64,) * depth, 10, activation=activation, init=scheme).double()
    layers = init.check(model, torch.randn(128, 64, dtype=torch.float64)).layers[:-1]
    return (layers[0].backward_variance / layers[-1].backward_variance) ** 0.5


def main(out=None):
    found = {"sigmoid slope": (torch.sigmoid(torch.tensor(0.0)) * (1 - torch.sigmoid(torch.tensor(0.0)))).item()}
    print(f"The sigmoid's largest slope is {found['sigmoid slope']}; 0.25^20 = {0.25**20:.0e}")

    generator = torch.Generator().manual_seed(0)
    found["product"] = {}
    for scale in (1.0, 4**-0.5, 0.3):
        product = torch.eye(4, dtype=torch.float64)
        for _ in range(100):
            product = torch.randn(4, 4, generator=generator, dtype=torch.float64) * scale @ product
        found["product"][scale] = product.abs().max().item()
        print(
            f"100 matrices of 4 x 4, entries of standard deviation {scale}: largest element {product.abs().max():.0e}"
        )

    figure, panel = plt.subplots()
    for activation, scheme in (
        ("sigmoid", "xavier_uniform"),
        ("relu", "xavier_uniform"),
        ("relu", "he_normal"),
        ("tanh", "xavier_uniform"),
    ):
        name = f"{activation}, {scheme}"
        found[name] = [first_over_last(activation, scheme, depth) for depth in DEPTHS]
        panel.loglog(DEPTHS, found[name], "o-", label=name)
        print(f"{name:23} gradient at the first layer over the last, 40 deep: {found[name][-1]:.0e}")
    panel.set_xticks(DEPTHS, DEPTHS)
    panel.minorticks_off()
    panel.set(xlabel="hidden layers", ylabel="first gradient / last", ylim=(1e-26, 1e3))
    panel.legend(fontsize="small", loc="lower left")
    save(figure, out)
    print("Sigmoids lose the gradient at any start; ReLU keeps its size with He's start, and loses it with Xavier's.")
    return found


if __name__ == "__main__":
    start(main)
