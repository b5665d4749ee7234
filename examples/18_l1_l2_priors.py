"""L1 or L2, and what do they believe?

L2 is a Gaussian prior on the weights: it shrinks all of them, none to zero. L1 is a Laplace prior: it sets many to
zero exactly. Here 10 of 100 inputs matter; both are solved by proximal steps and checked against the posterior.
"""

import torch
from common import GREY, plt, save, start

ROWS, INPUTS, USED, NOISE = 80, 100, 10, 0.5


def solve(x, y, penalty, strength, steps=3000):
    """Least squares with strength * |w| (l1) or strength / 2 * w^2 (l2), by proximal gradient descent."""
    gram, target = x.T @ x / len(x), x.T @ y / len(x)
    rate = 1 / torch.linalg.eigvalsh(gram)[-1]
    w = torch.zeros(INPUTS, dtype=x.dtype)
    for _ in range(steps):
        w = w - rate * (gram @ w - target)
        shrunk = w.sign() * (w.abs() - rate * strength).clamp(min=0)
        w = shrunk if penalty == "l1" else w / (1 + rate * strength)
    return w


def log_posterior(w, x, y, penalty, strength):
    """Gaussian noise and a Gaussian or Laplace prior whose scale is what the strength stands for, up to a constant."""
    scale = NOISE**2 / (strength * len(x))
    spread = scale**0.5 if penalty == "l2" else scale
    prior = torch.distributions.Normal(0, spread) if penalty == "l2" else torch.distributions.Laplace(0, spread)
    return torch.distributions.Normal(x @ w, NOISE).log_prob(y).sum() + prior.log_prob(w.double()).sum()


def main(out=None):
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(INPUTS, dtype=torch.float64)
    true[:USED] = torch.tensor([2.0, -2.0] * (USED // 2))
    x = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64)
    y = x @ true + NOISE * torch.randn(ROWS, generator=generator, dtype=torch.float64)
    figure, panels = plt.subplots(1, 2, sharey=True)
    found = {}
    for panel, penalty in zip(panels, ("l1", "l2")):
        w = solve(x, y, penalty, 0.1)
        best = log_posterior(w, x, y, penalty, 0.1)
        nudges = 1e-2 * torch.randn(200, INPUTS, generator=generator, dtype=torch.float64)
        found[penalty] = {
            "zeros": int((w == 0).sum()),
            "error": (w - true).norm().item(),
            "is the mode": all(log_posterior(w + nudge, x, y, penalty, 0.1) < best for nudge in nudges),
        }
        print(
            f"{penalty}: {found[penalty]['zeros']} of {INPUTS} weights are exactly 0; distance from the truth "
            f"{found[penalty]['error']:.2f}; most probable under its prior: {found[penalty]['is the mode']}"
        )
        panel.stem(w, basefmt=" ", markerfmt=".")
        panel.plot(true, "_", color=GREY, markersize=4)
        panel.set(title=f"{penalty}: {found[penalty]['zeros']} zeros", xlabel="weight")
    save(figure, out)
    print("Where few inputs matter, L1 finds them; L2 spreads its belief over all.")
    return found


if __name__ == "__main__":
    start(main)
