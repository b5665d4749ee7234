"""How does one find a learning rate?

Range test: raise it a little every step and watch the loss. It falls, then explodes; a tenth of where it is lowest is a
good first guess. Then the check: too low crawls, too high diverges, in between it learns.
"""

import torch
from common import GREY, accuracy, digits, fit, plt, save, start

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP


def range_test(data, low=1e-3, high=1e2, steps=150):
    torch.manual_seed(0)
    model = MLP(64, (64,), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=low)
    step = TrainStep(model, "cross_entropy", optimizer)
    rates, losses, smooth = [], [], None
    for index in range(steps):
        rate = low * (high / low) ** (index / (steps - 1))
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randint(len(data.x), (64,))
        loss = step(data.x[rows], data.y[rows]).loss
        smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
        rates.append(rate)
        losses.append(smooth)
        if smooth > 4 * losses[0]:
            break
    return rates, losses


def main(out=None):
    data = digits()
    rates, losses = range_test(data)
    lowest = rates[losses.index(min(losses))]
    guess = lowest / 10
    found = {"lowest": lowest, "guess": guess, "scores": {}}
    print(f"range test: loss lowest at {lowest:.2g}, so the first guess is {guess:.2g}")
    figure, (left, right) = plt.subplots(1, 2)
    left.semilogx(rates, losses)
    left.axvline(guess, color=GREY, linestyle="--", label=f"guess {guess:.2g}")
    left.set(xlabel="learning rate", ylabel="smoothed loss", title="range test", ylim=(0, 4))
    left.legend()
    for name, lr in (("guess", guess), ("too low", guess / 300), ("too high", guess * 300)):
        torch.manual_seed(0)
        model = MLP(64, (64,), 10)
        means = fit(model, data.x, data.y, epochs=10, optimizer=torch.optim.SGD(model.parameters(), lr=lr))
        found["scores"][name] = accuracy(model, data.x_test, data.y_test)
        right.semilogy(means, "o-", label=f"{name}: {lr:.2g}")
        print(f"{name:8} ({lr:.2g}): accuracy {found['scores'][name]:.3f} after 10 epochs, last loss {means[-1]:.3g}")
    right.set(xlabel="epoch", ylabel="loss")
    right.legend(fontsize="small")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
