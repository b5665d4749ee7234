"""What does batch normalisation do to the loss surface?

It makes the loss blind to the size of the weights before it, so walking far along a gradient is less dangerous. Below:
the loss along the gradient from a trained point, for both networks, and the learning rates that each survives.
"""

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

RATES = [0.01, 0.1, 1.0, 3.0, 10.0]


def along_gradient(model, data, steps):
    """Loss at distances along the negative gradient, relative to the weights' own norm (training mode)."""
    model.train()
    parameters = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(data.x), data.y)
    gradients = torch.autograd.grad(loss, parameters)
    unit = sum(p.norm() ** 2 for p in parameters).sqrt() / sum(g.norm() ** 2 for g in gradients).sqrt()
    start_point, losses = [p.detach().clone() for p in parameters], []
    with torch.no_grad():
        for t in steps:
            for p, begin, g in zip(parameters, start_point, gradients):
                p.copy_(begin - t * unit * g)
            losses.append(torch.nn.functional.cross_entropy(model(data.x), data.y).item())
    return losses


def main(out=None):
    data = digits()
    steps = torch.linspace(0, 2, 41).tolist()
    figure, (left, right) = plt.subplots(1, 2)
    found = {}
    for name, norm in (("without", None), ("batch norm", "batch")):
        torch.manual_seed(0)
        model = MLP(64, (64, 64, 64), 10, norm=norm)
        fit(model, data.x, data.y, epochs=3)
        losses = along_gradient(model, data, steps)
        scores = []
        for lr in RATES:
            torch.manual_seed(0)
            model = MLP(64, (64, 64, 64), 10, norm=norm)
            fit(model, data.x, data.y, epochs=10, optimizer=torch.optim.SGD(model.parameters(), lr=lr))
            scores.append(accuracy(model, data.x_test, data.y_test))
        found[name] = {"worst": max(losses), "scores": dict(zip(RATES, scores))}
        left.semilogy(steps, losses, label=name)
        right.semilogx(RATES, scores, "o-")
        print(
            f"{name:10} loss up to {max(losses):.3g} along the gradient; accuracy by learning rate: "
            + ", ".join(f"{lr}: {score:.2f}" for lr, score in found[name]["scores"].items())
        )
    left.set(xlabel="distance along the gradient / norm of the weights", ylabel="loss")
    left.legend()
    right.set(xlabel="learning rate of SGD", ylabel="test accuracy")
    save(figure, out)
    print("With batch norm the surface along the gradient stays lower, and larger rates still learn.")
    return found


if __name__ == "__main__":
    start(main)
