"""How does a framework know the gradient?

It writes down each operation as it happens (a tape) and reads the tape backwards, multiplying slopes. Here is such a
tape for scalars in thirty lines; it minimises (w - 5)^2, and torch's own tape gives the same numbers bit for bit.
"""

import torch
from common import plt, save, start


class Scalar:
    """A number that remembers which numbers it was made from, and its slope with respect to each."""

    def __init__(self, value, parents=()):
        self.value, self.parents, self.grad = value, parents, 0.0

    def __sub__(self, other):
        return Scalar(self.value - other.value, [(self, 1.0), (other, -1.0)])

    def __mul__(self, other):
        return Scalar(self.value * other.value, [(self, other.value), (other, self.value)])

    def backward(self):
        """Go through the tape from the end: every number is done before those it was made from."""
        order, seen = [], set()

        def visit(node):
            if id(node) not in seen:
                seen.add(id(node))
                for parent, _ in node.parents:
                    visit(parent)
                order.append(node)

        visit(self)
        self.grad = 1.0
        for node in reversed(order):
            for parent, slope in node.parents:
                parent.grad += node.grad * slope


def main(out=None):
    w, tensor = Scalar(0.0), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    path, same = [w.value], True
    for _ in range(30):
        difference = w - Scalar(5.0)
        loss = difference * difference
        loss.backward()
        (gradient,) = torch.autograd.grad((tensor - 5.0).square(), tensor)
        same = same and w.grad == gradient.item()
        w = Scalar(w.value - 0.1 * w.grad)
        with torch.no_grad():
            tensor -= 0.1 * gradient
        path.append(w.value)
    print(f"after 30 steps of 0.1: w = {w.value:.4f}; every gradient equals torch's: {same}")
    print(f"The distance from 5 shrinks by 1 - 2 * 0.1 each step: {(5 - path[2]) / (5 - path[1]):.2f}.")

    figure, panel = plt.subplots()
    grid = torch.linspace(-0.5, 6, 100)
    panel.plot(grid, (grid - 5) ** 2)
    panel.plot(path, [(value - 5) ** 2 for value in path], "o-", markersize=5)
    panel.set(xlabel="w", ylabel="(w - 5)²")
    save(figure, out)
    return {"w": w.value, "same": same, "ratio": (5 - path[2]) / (5 - path[1])}


if __name__ == "__main__":
    start(main)
