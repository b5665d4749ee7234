"""Is an L2 penalty in the loss the same as the optimizer's weight decay?

For SGD, yes: the gradient of lambda/2 w^2 is lambda w. For Adam, the penalty's gradient is divided by its running size
like any other, so it is not decay; AdamW decays apart from the gradient and differs from Adam with a penalty.
"""

import torch
from common import digits, plt, save, start

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP

DECAY, LR = 0.1, 0.01


def run(data, make, penalty):
    """Train 50 steps; return all weights. penalty: put lambda/2 |w|^2 into the loss."""
    torch.manual_seed(0)
    model = MLP(64, (32,), 10).double()

    def loss(output, target):
        value = torch.nn.functional.cross_entropy(output, target)
        return value + DECAY / 2 * sum(p.square().sum() for p in model.parameters()) if penalty else value

    step = TrainStep(model, loss, make(model.parameters()))
    for start_row in range(0, 50 * 20, 20):
        step(data.x[start_row : start_row + 20].double(), data.y[start_row : start_row + 20])
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main(out=None):
    data = digits()
    optim = torch.optim
    runs = {
        "SGD, penalty": run(data, lambda p: optim.SGD(p, lr=LR), True),
        "SGD, weight_decay": run(data, lambda p: optim.SGD(p, lr=LR, weight_decay=DECAY), False),
        "Adam, penalty": run(data, lambda p: optim.Adam(p, lr=LR), True),
        "Adam, weight_decay": run(data, lambda p: optim.Adam(p, lr=LR, weight_decay=DECAY), False),
        "AdamW, weight_decay": run(data, lambda p: optim.AdamW(p, lr=LR, weight_decay=DECAY), False),
    }
    pairs = {
        "SGD": ("SGD, penalty", "SGD, weight_decay"),
        "Adam": ("Adam, penalty", "Adam, weight_decay"),
        "Adam against AdamW": ("Adam, penalty", "AdamW, weight_decay"),
    }
    found = {name: ((runs[a] - runs[b]).norm() / runs[a].norm()).item() for name, (a, b) in pairs.items()}
    for name, value in found.items():
        a, b = pairs[name]
        print(f"{a} against {b}: weights differ by {value:.0e} of their norm")
    found["norms"] = {name: weights.norm().item() for name, weights in runs.items()}
    print("For one optimizer the two are the same up to rounding; AdamW's decay is another thing than Adam's penalty.")

    figure, panel = plt.subplots()
    panel.barh(list(runs), list(found["norms"].values()))
    panel.invert_yaxis()
    panel.set(xlabel=f"norm of the weights after 50 steps, lambda {DECAY}")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
