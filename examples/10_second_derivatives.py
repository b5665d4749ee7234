"""Can one differentiate twice?

The fused ops are differentiable once; asking for more is an error that names the way out, never a wrong number. The
way out is mlpkit.reference (same formulas in stock PyTorch) or `to_sequential`: slower, differentiable without end.
"""

import time

import torch
from common import plt, save, start

from mlpkit.nn import MLP


def penalty(model, x):
    """Squared norm of the gradient with respect to the input, to be differentiated again (a gradient penalty)."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return gradient.square().sum()


def seconds(call, repeats=30):
    call()
    begin = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - begin) / repeats


def main(out=None):
    torch.manual_seed(0)
    model = MLP(32, (128, 128), 1, activation="tanh")
    stock, x = model.to_sequential(), torch.randn(256, 32)
    found = {}
    try:
        penalty(model, x).backward()
        found["fused"] = "no error"
    except RuntimeError as error:
        found["fused"] = str(error)
    print(f"fused: {found['fused'].splitlines()[0]}")

    # d/de of the first derivative along a direction, against the second derivative that autograd gives.
    double, point = stock.double(), x[:1].double()
    hessian = torch.autograd.functional.hessian(lambda row: double(row).sum(), point)[0, :, 0]
    direction, h = torch.randn(32, dtype=torch.float64), 1e-5

    def slope(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(double(at).sum(), at)[0][0]

    by_difference = (slope(point + h * direction) - slope(point - h * direction)) / (2 * h)
    found["error"] = (hessian @ direction - by_difference).abs().max().item()
    print(f"to_sequential(): Hessian times a vector against differences of the gradient: {found['error']:.0e}")

    stock = model.to_sequential()
    found["seconds"] = {
        "first, fused": seconds(lambda: model(x).sum().backward()),
        "first, stock": seconds(lambda: stock(x).sum().backward()),
        "second, stock": seconds(lambda: penalty(stock, x).backward()),
    }
    ratio = found["seconds"]["second, stock"] / found["seconds"]["first, stock"]
    print(f"In stock modules a second derivative took {ratio:.1f} times a first one in this run.")

    figure, panel = plt.subplots()
    panel.bar(list(found["seconds"]), [value * 1e6 for value in found["seconds"].values()])
    panel.set(ylabel="us of CPU time, this run")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
