"""What changes between training and testing with batch normalisation?

Training divides by the batch's own statistics and keeps running averages; testing uses the averages, so that a row's
answer does not depend on its neighbours. A bias before the norm is taken away by the mean: it does nothing.
"""

import torch
from common import accuracy, digits, fit, loss_of, plt, save, start
from torch import nn

from mlpkit.nn import MLP


def main(out=None):
    data = digits()
    found = {"gap": []}
    torch.manual_seed(0)
    model = MLP(64, (64,), 10, norm="batch", activation="relu")

    def record(epoch):
        """Distance of the running mean and variance from those of all training rows, under the present weights."""
        with torch.no_grad():
            z = data.x @ model.layers[0].weight.T
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
        found["gap"].append(((norm.running_mean - z.mean(0)).norm() / z.mean(0).norm()).item())

    record(-1)
    fit(model, data.x, data.y, epochs=15, after_epoch=record)
    print(
        f"running mean: {found['gap'][0]:.0%} off before training, {found['gap'][1]:.1%} after one epoch, "
        f"{found['gap'][-1]:.1%} at the end"
    )

    alone = torch.cat([model.eval()(row[None]) for row in data.x_test]).detach()
    with torch.no_grad():
        found["alone"] = (alone - model(data.x_test)).abs().max().item()
    print(
        f"eval, rows one by one or all at once: logits differ by {found['alone']:.0e}; accuracy "
        f"{accuracy(model, data.x_test, data.y_test):.3f}"
    )

    # A bias before the norm: its gradient is 0 up to rounding, whatever it is.
    stock = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)).double()
    x, y = data.x.double(), data.y
    loss = nn.functional.cross_entropy(stock(x), y)
    loss.backward()
    found["bias gradient"] = stock[0].bias.grad.abs().max().item()
    found["weight gradient"] = stock[0].weight.grad.abs().max().item()
    with torch.no_grad():
        before = stock.train()(x)
        stock[0].bias.add_(5.0)
        found["shift"] = (stock(x) - before).abs().max().item()
    print(
        f"a bias before the norm: gradient {found['bias gradient']:.0e} (weights "
        f"{found['weight gradient']:.0e}); adding 5 to it moves outputs by {found['shift']:.0e}"
    )
    found["parameters"] = [name for name, _ in model.named_parameters()]
    print(
        f"mlpkit.nn.MLP with a norm has none: {', '.join(found['parameters'][:3])}, ...; test loss "
        f"{loss_of(model, data.x_test, data.y_test):.3f}"
    )

    figure, panel = plt.subplots()
    panel.semilogy(found["gap"], "o-")
    panel.set(xlabel="epochs", ylabel="running mean off by")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
