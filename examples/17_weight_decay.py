"""What does weight decay do when there are more inputs than rows?

Twenty rows, two hundred inputs, y = 0.05 + sum of 0.01 x_i + noise. Without decay a linear model fits the rows
exactly and the noise with them. Decay shrinks the weights: the training error rises, the test error falls, then rises.
"""

import torch
from common import fit, loss_of, plt, save, start

from mlpkit.nn import MLP

LAMBDAS = [0.0, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0]


def draw(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 200, generator=generator)
    return x, (0.05 + 0.01 * x.sum(1) + 0.01 * torch.randn(rows, generator=generator))[:, None]


def main(out=None):
    x, y = draw(20, 0)
    x_test, y_test = draw(500, 1)
    mse = torch.nn.functional.mse_loss
    found = {}
    for decay in LAMBDAS:
        torch.manual_seed(0)
        model = MLP(200, (), 1, init="normal")
        layer = model.layers[0]
        groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
        fit(model, x, y, "mse", epochs=600, batch_size=20, optimizer=torch.optim.SGD(groups, lr=0.005))
        found[decay] = {
            "train": loss_of(model, x, y, mse),
            "test": loss_of(model, x_test, y_test, mse),
            "norm": layer.weight.norm().item(),
        }
        print(
            f"lambda {decay:5}: training error {found[decay]['train']:.1e}, test error {found[decay]['test']:.4f}, "
            f"norm of the weights {found[decay]['norm']:.3f}"
        )
    best = min(LAMBDAS, key=lambda decay: found[decay]["test"])
    print(f"The best lambda here is {best}: some decay helps, too much leaves only the mean.")

    figure, panel = plt.subplots()
    places = range(len(LAMBDAS))
    panel.semilogy(places, [found[d]["train"] for d in LAMBDAS], "o-", label="training error")
    panel.semilogy(places, [found[d]["test"] for d in LAMBDAS], "o-", label="test error")
    panel.semilogy(places, [found[d]["norm"] ** 2 for d in LAMBDAS], "o--", label="squared norm of the weights")
    panel.set_xticks(places, LAMBDAS)
    panel.set(xlabel="lambda", ylim=(1e-5, 0.1))
    panel.legend(fontsize="small")
    save(figure, out)
    return {"best": best, **found}


if __name__ == "__main__":
    start(main)
