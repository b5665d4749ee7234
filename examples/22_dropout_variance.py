"""What does dropout do to the activations?

Survivors are scaled by 1 / (1 - p), so the mean stays and the variance grows: each layer's output is noisier in
training. Watched over a whole run, layer by layer, with dropout and without.
"""

import torch
from common import COLOURS, digits, fit, plt, save, start

from mlpkit.nn import MLP


@torch.no_grad()
def layer_outputs(model, x):
    """Outputs of the hidden layers in the model's present mode (train: with dropout)."""
    for layer in model.layers[:-1]:
        x = layer(x)
        yield x


def main(out=None):
    data = digits()
    figure, panels = plt.subplots(1, 2, sharey=True)
    found = {}
    for panel, p in zip(panels, (0.0, 0.5)):
        torch.manual_seed(0)
        model = MLP(64, (64, 64), 10, dropout=p, init="he_normal")
        variances = []

        def record(epoch, model=model, variances=variances):
            model.train()
            variances.append([h.var(0).mean().item() for h in layer_outputs(model, data.x)])

        record(-1)
        fit(model, data.x, data.y, epochs=25, after_epoch=record)
        for layer, values in enumerate(zip(*variances)):
            panel.plot(values, color=COLOURS[layer], label=f"hidden layer {layer + 1}")
        panel.set(title=f"dropout {p}", xlabel="epoch")
        found[p] = {"begin": variances[0], "end": variances[-1]}
        print(
            f"dropout {p}: mean variance of a unit {variances[0][0]:.2f} and {variances[0][1]:.2f} at the start, "
            f"{variances[-1][0]:.2f} and {variances[-1][1]:.2f} after training"
        )
    panels[0].set_ylabel("variance of a unit over the rows")
    panels[0].legend()
    save(figure, out)

    # For a given input h: E[drop(h)] = h, Var[drop(h)] = h^2 p / (1 - p).
    h = torch.full((2000, 64), 3.0)
    dropped = MLP(64, (64,), 1, dropout=0.5).train().layers[0]
    with torch.no_grad():
        dropped.weight.copy_(torch.eye(64))
        dropped.bias.zero_()
        y = dropped(h)
    found["mean"], found["variance"] = y.mean().item(), y.var().item()
    print(
        f"3 through dropout 0.5: mean {found['mean']:.2f} (3), variance {found['variance']:.2f} (3^2 * 0.5 / 0.5 = 9)"
    )
    return found


if __name__ == "__main__":
    start(main)
