"""What does a framework do, and what does a fused one do faster?

The same two-layer network (64 rows of 1000 numbers, 100 hidden units, 10 outputs) trained in NumPy by hand, in PyTorch
and in mlpkit: from the same weights they go through the same losses. What differs is the time.
"""

import statistics
import time
from itertools import pairwise

import numpy as np
import torch
from common import plt, save, start
from threadpoolctl import threadpool_limits

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP

WAYS, STEPS, LR = ["NumPy", "PyTorch", "mlpkit"], 200, 1e-3


def in_numpy(x, y, w1, w2):
    for _ in range(STEPS):
        hidden = np.maximum(x @ w1.T, 0)
        difference = hidden @ w2.T - y
        yield np.mean(difference**2)
        d_output = 2 * difference / difference.size  # the chain rule, by hand, from here on
        d_hidden = (d_output @ w2) * (hidden > 0)
        w1, w2 = w1 - LR * d_hidden.T @ x, w2 - LR * d_output.T @ hidden


def in_pytorch(x, y, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        yield loss.item()


def in_mlpkit(x, y, model):
    step = TrainStep(model, "mse", torch.optim.SGD(model.parameters(), lr=LR))
    yield from (step(x, y).loss for _ in range(STEPS))


def main(out=None):
    torch.manual_seed(0)
    x, y = torch.randn(64, 1000), torch.randn(64, 10)
    model = MLP(1000, (100,), 10, init="he_normal", bias=False)
    stock = model.to_sequential()
    w1, w2 = (layer.weight.detach().numpy().copy() for layer in model.layers)
    runs = [in_numpy(x.numpy(), y.numpy(), w1, w2), in_pytorch(x, y, stock), in_mlpkit(x, y, model)]
    losses, seconds = {}, {}
    with threadpool_limits(1):
        for name, run in zip(WAYS, runs):
            losses[name], clock = [], [time.process_time()]
            for loss in run:
                losses[name].append(float(loss))
                clock.append(time.process_time())
            seconds[name] = statistics.median(after - before for before, after in pairwise(clock))
            print(
                f"{name:8} loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}, {seconds[name] * 1e6:5.0f} us a step"
            )
    difference = max(abs(np.array(losses[name]) / losses["NumPy"] - 1).max() for name in ("PyTorch", "mlpkit"))
    print(f"All {STEPS} losses agree within {difference:.0e} of their value: three notations for one computation.")

    figure, (left, right) = plt.subplots(1, 2)
    for name, style in zip(WAYS, ("-", "--", ":")):
        left.plot(losses[name], style, linewidth=2.5, label=name)
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    right.bar(WAYS, [seconds[name] * 1e6 for name in WAYS])
    right.set(ylabel="us of CPU time a step, this run")
    save(figure, out)
    return {"losses": losses, "seconds": seconds, "difference": difference}


if __name__ == "__main__":
    start(main)
