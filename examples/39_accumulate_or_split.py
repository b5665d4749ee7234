"""Too large a batch for one device: accumulate, or split over devices?

Both give the gradient of the whole batch: the mean of the parts' means, when the parts are equal. Accumulating takes
four times as long on one device, splitting takes four devices. Batch norm tells them apart from the whole batch.
"""

import torch
from common import digits, plt, save, start

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP


def build(norm=None):
    torch.manual_seed(0)
    model = MLP(64, (64,), 10, norm=norm).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def whole(x, y, norm):
    model, optimizer = build(norm)
    TrainStep(model, "cross_entropy", optimizer)(x, y)
    return model


def accumulated(x, y, norm):
    model, optimizer = build(norm)
    step = TrainStep(model, "cross_entropy", optimizer, accumulate=4)
    for rows in torch.arange(len(x)).chunk(4):
        step(x[rows], y[rows])
    return model


def split(x, y, norm):
    """What DistributedDataParallel does, ranks one after another: own gradients, their mean, one update."""
    model, optimizer = build(norm)
    shares = []
    for rows in torch.arange(len(x)).chunk(4):
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        shares.append(torch.autograd.grad(loss, list(model.parameters())))
    for parameter, gradients in zip(model.parameters(), zip(*shares)):
        parameter.grad = torch.stack(gradients).mean(0)
    optimizer.step()
    return model


def main(out=None):
    data = digits()
    x, y = data.x[:256].double(), data.y[:256]
    found = {}
    for norm in (None, "batch"):
        reference = torch.cat([p.detach().flatten() for p in whole(x, y, norm).parameters()])
        for way in (accumulated, split):
            weights = torch.cat([p.detach().flatten() for p in way(x, y, norm).parameters()])
            found[way.__name__, norm] = ((weights - reference).norm() / reference.norm()).item()
            print(
                f"{way.__name__:11}, norm {norm!s:5}: weights differ from the whole batch's by "
                f"{found[way.__name__, norm]:.0e}"
            )
    print("Without batch norm all three are one step; with it, each part is normalised by its own statistics.")

    figure, panel = plt.subplots()
    panel.bar([f"{way}\nnorm {norm}" for way, norm in found], list(found.values()))
    panel.set_yscale("log")
    panel.set(ylabel="relative difference")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
