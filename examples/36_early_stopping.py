"""When should training stop?

When the validation loss has not fallen by min_delta for `patience` epochs; then the best weights come back. Patience
is paid in epochs; min_delta stops earlier, at weights that are nearly as good or not. Ten lines, on noisy labels.
"""

import copy

import torch
from common import GREY, digits, fit, loss_of, plt, save, start

from mlpkit.nn import MLP


class EarlyStopping:
    """True when the loss has failed to fall by min_delta for `patience` calls; keeps the best weights."""

    def __init__(self, patience, min_delta=0.0):
        self.patience, self.min_delta, self.best, self.waited = patience, min_delta, float("inf"), 0

    def __call__(self, loss, model):
        if loss < self.best - self.min_delta:
            self.best, self.waited, self.weights = loss, 0, copy.deepcopy(model.state_dict())
        else:
            self.waited += 1
        return self.waited >= self.patience


def main(out=None):
    data = digits(500)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(500, generator=generator) < 0.2
    y = torch.where(wrong, torch.randint(10, (500,), generator=generator), data.y)
    x_train, y_train, x_held, y_held = data.x[:350], y[:350], data.x[350:], y[350:]
    found = {}
    figure, panel = plt.subplots()
    for patience, min_delta in ((1, 0.0), (10, 0.0), (10, 0.05), (200, 0.0)):
        torch.manual_seed(1)
        model = MLP(64, (128,), 10)
        stopper, curve = EarlyStopping(patience, min_delta), []

        def after(epoch, model=model, stopper=stopper, curve=curve):
            curve.append(loss_of(model, x_held, y_held))
            return stopper(curve[-1], model)

        fit(model, x_train, y_train, epochs=120, batch_size=16, lr=1e-3, after_epoch=after)
        last = loss_of(model, data.x_test, data.y_test)
        model.load_state_dict(stopper.weights)
        kept = loss_of(model, data.x_test, data.y_test)
        found[patience, min_delta] = {"epochs": len(curve), "last": last, "kept": kept, "held": stopper.best}
        print(
            f"patience {patience:3}, min_delta {min_delta}: {len(curve):3} epochs; test loss {kept:.3f} with the best "
            f"weights, {last:.3f} with the last"
        )
    print("More patience took more epochs; the weights that are kept can only get better on the validation rows.")
    panel.plot(curve, label="validation loss, never stopped")
    for (patience, min_delta), entry in found.items():
        panel.axvline(entry["epochs"], color=GREY, linestyle=":")
        panel.text(
            entry["epochs"],
            max(curve) * 0.97,
            f"{patience}, {min_delta}",
            rotation=90,
            va="top",
            ha="right",
            fontsize=8,
        )
    panel.set(xlabel="epoch (dotted: patience, min_delta)", ylabel="loss")
    panel.legend(loc="lower right")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
