"""What can depth do that width cannot?

Fold. Each layer below folds the line in two with two ReLU units, so k layers make a sawtooth of 2^(k-1) teeth with 2k
units. One hidden layer has at most one kink a unit: it needs 2^k of them for the same function.
"""

import torch
from common import plt, save, start

from mlpkit.nn import MLP


def sawtooth(depth):
    """Layers that each compute 2x below 1/2 and 2 - 2x above, as 2 relu(x) - 4 relu(x - 1/2)."""
    model = MLP(1, (2,) * depth, 1).double()
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            combine = torch.tensor([[2.0, -4.0]], dtype=torch.float64)
            layer.weight.copy_(torch.ones(2, 1) if index == 0 else combine.expand(layer.weight.shape))
            layer.bias.copy_(torch.tensor([0.0, -0.5]) if index < depth else torch.zeros(1))
    return model


def shallow(depth):
    """The same function in one hidden layer: a unit for each kink."""
    pieces = 2**depth
    model = MLP(1, (pieces,), 1).double()
    with torch.no_grad():
        model.layers[0].weight.fill_(1)
        model.layers[0].bias.copy_(-torch.arange(pieces, dtype=torch.float64) / pieces)
        signs = 2.0 * pieces * (-1.0) ** torch.arange(pieces, dtype=torch.float64)
        signs[0] = pieces
        model.layers[1].weight.copy_(signs[None])
        model.layers[1].bias.zero_()
    return model


def main(out=None):
    x = torch.linspace(0, 1, 4097, dtype=torch.float64)[:, None]
    found = {}
    figure, panels = plt.subplots(1, 3, sharey=True)
    for panel, depth in zip(panels, (1, 3, 6)):
        deep, wide = sawtooth(depth), shallow(depth)
        with torch.no_grad():
            y, other = deep(x), wide(x)
        found[depth] = {
            "teeth": int(((y[1:-1] > y[:-2]) & (y[1:-1] > y[2:])).sum()),
            "units": (2 * depth, 2**depth),
            "difference": (y - other).abs().max().item(),
        }
        print(
            f"{depth} layers of 2: {found[depth]['teeth']} teeth from {2 * depth} units; one layer needs {2**depth} "
            f"(largest difference {found[depth]['difference']:.0e})"
        )
        panel.plot(x, y, linewidth=1)
        panel.set(title=f"{2 * depth} units deep = {2**depth} wide", xlabel="x")
    save(figure, out)
    print("Units grow linearly with depth, teeth exponentially.")
    return found


if __name__ == "__main__":
    start(main)
