"""What does the batch size change?

A larger batch makes fewer, less noisy steps an epoch. At one learning rate small batches get further per epoch because
they step more often; scaling the rate with the batch (SGD) wins most of that back, up to a point.
"""

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

SIZES = [8, 32, 128, 512]


def main(out=None):
    data = digits()
    found = {}
    for rule in ("one rate", "rate grows with the batch"):
        found[rule] = []
        for size in SIZES:
            torch.manual_seed(0)
            model = MLP(64, (64,), 10)
            lr = 0.05 * (size / 32 if rule != "one rate" else 1)
            fit(model, data.x, data.y, epochs=10, batch_size=size, optimizer=torch.optim.SGD(model.parameters(), lr=lr))
            found[rule].append(accuracy(model, data.x_test, data.y_test))
        print(f"{rule:26}" + "".join(f"  batch {size}: {score:.3f}" for size, score in zip(SIZES, found[rule])))

    # The noise of a batch's gradient falls with the root of its size.
    torch.manual_seed(0)
    model = MLP(64, (64,), 10)
    weight = model.layers[0].weight
    found["noise"] = []

    def gradient(rows):
        loss = torch.nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
        return torch.autograd.grad(loss, weight)[0]

    whole = gradient(slice(None))
    for size in SIZES:
        draws = [gradient(torch.randint(len(data.x), (size,))) - whole for _ in range(100)]
        found["noise"].append((torch.stack(draws).square().sum((1, 2)).mean().sqrt() / whole.norm()).item())
    ratio = found["noise"][0] / found["noise"][-1]
    print(
        f"noise of the gradient: {found['noise'][0]:.2f} of its size at batch 8, {found['noise'][-1]:.2f} at "
        f"512: {ratio:.1f} times less, the root of 64 is 8"
    )

    figure, (left, right) = plt.subplots(1, 2)
    for rule in ("one rate", "rate grows with the batch"):
        left.semilogx(SIZES, found[rule], "o-", label=rule)
    left.set(xlabel="batch size", ylabel="accuracy after 10 epochs")
    right.loglog(SIZES, found["noise"], "o-")
    right.set(xlabel="batch size", ylabel="noise / gradient")
    for panel in (left, right):
        panel.set_xticks(SIZES, SIZES)
        panel.minorticks_off()
    right.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    left.legend(fontsize="small")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
