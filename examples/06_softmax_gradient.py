"""Why is the gradient of softmax regression so simple?

With softmax and cross-entropy, the gradient with respect to the logits is y_hat - y: the probability given, minus 1 at
the right class. Checked three ways: that formula, autograd, and differences of the loss itself.
"""

import torch
from common import BLUE, ORANGE, digits, plt, save, start

from mlpkit.nn import MLP


def main(out=None):
    data = digits()
    torch.manual_seed(0)
    model = MLP(64, (), 10).double()  # no hidden layer: softmax regression
    x, y = data.x[:32].double(), data.y[:32]
    logits = model(x).detach().requires_grad_()

    def loss(z):
        return torch.nn.functional.cross_entropy(z, y, reduction="sum")

    (by_autograd,) = torch.autograd.grad(loss(logits), logits)
    with torch.no_grad():
        by_formula = logits.softmax(1) - torch.nn.functional.one_hot(y, 10)
        by_difference, h = torch.empty_like(logits), 1e-5
        for row in range(32):
            for column in range(10):
                nudge = torch.zeros_like(logits)
                nudge[row, column] = h
                by_difference[row, column] = (loss(logits + nudge) - loss(logits - nudge)) / (2 * h)
    found = {
        "autograd": (by_formula - by_autograd).abs().max().item(),
        "differences": (by_formula - by_difference).abs().max().item(),
        "row sums": by_formula.sum(1).abs().max().item(),
    }
    print(f"y_hat - y against autograd: largest difference {found['autograd']:.0e}")
    print(f"y_hat - y against differences of the loss: {found['differences']:.0e}")
    print(f"each row sums to {found['row sums']:.0e}: what one class gains the others lose")

    figure, panel = plt.subplots()
    panel.bar(range(10), by_formula[0].tolist(), color=[ORANGE if c == y[0] else BLUE for c in range(10)])
    panel.axhline(0, linewidth=0.8, color="#7d8590")
    panel.set_xticks(range(10))
    panel.set(xlabel="class", ylabel="y_hat - y", title=f"one digit {y[0].item()}: push its logit up, all others down")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
