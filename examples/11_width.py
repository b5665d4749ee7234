"""How wide should a hidden layer be?

Too narrow is a bottleneck: it cannot keep what tells the digits apart. Wider helps until it does not. Far beyond, the
network could learn the training rows by heart like a lookup table; on these digits that costs little test accuracy.
"""

import torch
from common import accuracy, digits, fit, plt, save, start

from mlpkit.nn import MLP

WIDTHS = [1, 2, 4, 8, 16, 32, 64, 128, 512]


def main(out=None):
    data = digits(400)
    found = {}
    for width in WIDTHS:
        runs = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = MLP(64, (width,), 10)
            fit(model, data.x, data.y, epochs=120, lr=5e-3)
            runs.append([accuracy(model, data.x, data.y), accuracy(model, data.x_test, data.y_test)])
        found[width] = torch.tensor(runs).mean(0).tolist()
        parameters = sum(p.numel() for p in model.parameters())
        print(f"width {width:3} ({parameters:5} parameters): train {found[width][0]:.3f}, test {found[width][1]:.3f}")
    print(
        "Most of the gain is made by width 16. Beyond, the 400 training rows are known by heart and the test "
        "score stays."
    )

    figure, panel = plt.subplots()
    panel.plot(WIDTHS, [found[w][0] for w in WIDTHS], "o-", label="training rows")
    panel.plot(WIDTHS, [found[w][1] for w in WIDTHS], "o-", label="test rows")
    panel.set_xscale("log", base=2)
    panel.set(xlabel="width of the hidden layer", ylabel="accuracy")
    panel.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
