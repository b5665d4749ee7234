"""What are under- and overfitting?

Twenty noisy points of a cubic, fitted by polynomials of every degree. The training error can only fall with the
degree; the test error falls, then rises. More data moves the rise away. The fit is exact: a linear least-squares solve.
"""

import math

import torch
from common import GREY, plt, save, start

DEGREES = range(0, 16)


def features(x, degree, scaled=True):
    """x^i / i! for i = 0 .. degree: without 1 / i! the columns' sizes drift apart for |x| > 1."""
    return torch.stack([x**i / (math.factorial(i) if scaled else 1) for i in range(degree + 1)], 1)


def draw(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, generator=generator, dtype=torch.float64) * 6 - 3
    return x, truth(x) + torch.randn(rows, generator=generator, dtype=torch.float64)


def truth(x):
    return 1 + 1.2 * x - 3.4 * x**2 / 2 + 5.6 * x**3 / 6


def main(out=None):
    x_test, y_test = draw(1000, 1)
    found = {"train": {}, "test": {}, "condition": {}}
    for rows in (20, 40, 200):
        x, y = draw(rows, 0)
        for degree in DEGREES:
            a = features(x, degree)
            weights = torch.linalg.lstsq(a, y[:, None], driver="gelsd").solution[:, 0]
            found["train"][rows, degree] = (a @ weights - y).square().mean().item()
            found["test"][rows, degree] = (features(x_test, degree) @ weights - y_test).square().mean().item()
    for degree in (1, 3, 12):
        print(
            f"20 points, degree {degree:2}: training error {found['train'][20, degree]:.2f}, "
            f"test error {found['test'][20, degree]:.3g}; with 200 points {found['test'][200, degree]:.3g}"
        )
    x, y = draw(200, 0)
    for scaled in (True, False):
        a = features(x, 5, scaled)
        found["condition"][scaled] = torch.linalg.cond(a.T @ a).item()
        # Gradient descent at the largest stable rate: the smallest eigenvalue says how slowly it ends.
        eigenvalues = torch.linalg.eigvalsh(a.T @ a / 200)
        weights, exact = torch.zeros(6, dtype=torch.float64), torch.linalg.lstsq(a, y[:, None]).solution[:, 0]
        for _ in range(2000):
            weights -= a.T @ (a @ weights - y) / 200 / eigenvalues[-1]
        found["gap", scaled] = ((a @ (weights - exact)).square().mean()).item()
        print(
            f"degree 5 {'with' if scaled else 'without'} 1/i!: condition {found['condition'][scaled]:.1e}; "
            f"2000 steps of "
            f"gradient descent end {found['gap', scaled]:.1e} from the exact answer"
        )
    print("Degree 1 underfits, 3 is right, 12 overfits twenty points; two hundred points forgive it.")

    figure, panel = plt.subplots()
    for rows in (20, 40, 200):
        panel.semilogy(
            DEGREES, [found["test"][rows, d] for d in DEGREES], "o-", markersize=4, label=f"test, {rows} points"
        )
    panel.semilogy(DEGREES, [found["train"][20, d] for d in DEGREES], "--", color=GREY, label="training, 20 points")
    panel.set(xlabel="degree", ylabel="squared error", ylim=(1e-2, 1e4))
    panel.legend(fontsize="small")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
