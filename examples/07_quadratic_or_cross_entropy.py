"""Why not train a classifier with the squared error?

Behind a sigmoid, the slope of the squared error holds the sigmoid's own slope, which is nearly 0 where the answer is
badly wrong: the worse the mistake, the slower it learns. Cross-entropy cancels that factor.
"""

import torch
from common import plt, save, start

LOSSES = {
    "squared error": lambda z: (torch.sigmoid(z) - 0) ** 2 / 2,
    "cross-entropy": lambda z: torch.nn.functional.softplus(z),  # -log(1 - sigmoid(z)): the target is 0
}


def main(out=None):
    """One neuron, input 1, target 0: starting at a = 0.6 (a bit wrong) and at a = 0.99 (very wrong)."""
    figure, panels = plt.subplots(1, 2, sharey=True)
    found = {}
    for panel, begin in zip(panels, (0.4, 4.6)):
        for name, loss in LOSSES.items():
            z, outputs = torch.tensor(begin, dtype=torch.float64, requires_grad=True), []
            for _ in range(300):
                outputs.append(torch.sigmoid(z).item())
                (slope,) = torch.autograd.grad(loss(z), z)
                found.setdefault((name, begin), slope.item())
                with torch.no_grad():
                    z -= 0.15 * slope
            found[name, begin, "steps"] = next((i for i, a in enumerate(outputs) if a < 0.3), None)
            panel.plot(outputs, label=name)
        panel.set(title=f"starts at {torch.sigmoid(torch.tensor(begin)):.2f}", xlabel="step")
    panels[0].set_ylabel("output (0 is right)")
    panels[1].legend()
    save(figure, out)
    for name in LOSSES:
        slight, bad = found[name, 0.4], found[name, 4.6]
        steps = found[name, 4.6, "steps"] or "more than 300"
        print(
            f"{name}: slope {slight:.3f} when slightly wrong, {bad:.3f} when very wrong; from there {steps} "
            f"steps to 0.3"
        )
    print("The squared error learns slowest exactly where it is most wrong; cross-entropy fastest.")
    return found


if __name__ == "__main__":
    start(main)
