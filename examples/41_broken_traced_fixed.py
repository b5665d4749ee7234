"""What do the three classic breakdowns look like, traced, explained and fixed?

An Adam whose eps vanishes in float16 divides 0 by 0. A hand-written norm divides by the spread of a constant row. A
hand-written softmax exponentiates 100. The tracer explains each in one sentence; the fix is one line.
"""

import torch
from common import plt, save, start

from mlpkit.trace import Tracer


def optimizer_update(fixed):
    """Adam by hand in half precision: eps = 1e-8 is 0 in float16."""
    w = torch.ones(4, dtype=torch.float32 if fixed else torch.float16, requires_grad=True)
    (w * torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=w.dtype)).sum().backward()
    with torch.no_grad():
        moment, square = 0.1 * w.grad, 0.001 * w.grad.square()
        w -= 0.01 * moment / (square.sqrt() + torch.tensor(1e-8, dtype=w.dtype))
    return w


def normalisation(fixed):
    """Layer norm by hand on a batch with a constant row: its spread is 0."""
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    variance = x.var(1, keepdim=True, unbiased=False)
    return (x - x.mean(1, keepdim=True)) / ((variance + 1e-5) if fixed else variance).sqrt()


def softmax(fixed):
    """Softmax by hand: exp(100) is Inf in float32. Subtracting the maximum changes nothing but that."""
    z = torch.tensor([[1.0, 2.0, 100.0]])
    e = torch.exp(z - z.max(1, keepdim=True).values) if fixed else torch.exp(z)
    return e / e.sum(1, keepdim=True)


def main(out=None):
    found = {}
    for case in (optimizer_update, normalisation, softmax):
        for fixed in (False, True):
            with Tracer() as tracer:
                result = case(fixed)
                total = float(result.detach().sum())
            found[case.__name__, fixed] = {
                "verdict": tracer.diagnosis.verdict,
                "cause": tracer.diagnosis.cause,
                "finite": total == total and abs(total) != float("inf"),
            }
            if fixed:
                print(f"  fixed: {tracer.diagnosis.sentence}")
            else:
                print(f"{case.__name__}: {tracer.diagnosis.sentence}")

    figure, panel = plt.subplots()
    z = torch.linspace(0, 120, 200)
    with torch.no_grad():
        panel.semilogy(z, z.exp(), label="exp(z): Inf from 88.7 on")
        panel.semilogy(z, (z - z.max()).exp(), label="exp(z - max): at most 1")
    panel.set(xlabel="z", title="why the softmax broke")
    panel.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
