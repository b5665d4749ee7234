"""Can a network learn labels that mean nothing?

Yes: given time it learns random labels by heart. True labels are learnt first and faster, which is why stopping early
helps where some labels are wrong.
"""

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

NOISES = [0.0, 0.4, 1.0]


def main(out=None):
    data = digits(500)
    figure, panels = plt.subplots(1, 2, sharex=True)
    found = {}
    for noise in NOISES:
        generator = torch.Generator().manual_seed(0)
        wrong = torch.rand(500, generator=generator) < noise
        y = torch.where(wrong, torch.randint(10, (500,), generator=generator), data.y)
        torch.manual_seed(0)
        model = MLP(64, (256,), 10)
        train, test = [], []

        def record(epoch, model=model, y=y, train=train, test=test):
            train.append(accuracy(model, data.x, y))
            test.append(accuracy(model, data.x_test, data.y_test))

        fit(model, data.x, y, epochs=150, lr=3e-3, after_epoch=record)
        best = max(range(150), key=lambda epoch: test[epoch])
        reached = next((epoch + 1 for epoch, value in enumerate(train) if value >= 0.95), None)
        found[noise] = {"train": train[-1], "last": test[-1], "best": test[best], "epoch": best + 1, "reached": reached}
        print(
            f"{noise:.0%} of the labels random: 95 % of them learnt after {reached} epochs; test accuracy "
            f"{test[-1]:.3f} at "
            f"the end, {test[best]:.3f} at its best (epoch {best + 1})"
        )
        panels[0].plot(train, label=f"{noise:.0%} random")
        panels[1].plot(test)
    panels[0].set(title="training labels, right or wrong", xlabel="epoch", ylabel="accuracy")
    panels[1].set(title="true test labels", xlabel="epoch")
    panels[0].legend()
    save(figure, out)
    gain = found[0.4]["best"] - found[0.4]["last"]
    print(
        f"With 40 % random labels the right moment to stop is worth {gain:+.3f} of accuracy; without, "
        f"{found[0.0]['best'] - found[0.0]['last']:+.3f}."
    )
    return found


if __name__ == "__main__":
    start(main)
