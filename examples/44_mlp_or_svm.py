"""MLP or kernel SVM?

Sensitivity: both scored over a range of their main setting. Cost: an SVM's training time grows faster than its rows,
an MLP's epoch with them; the SVM is dropped when it stops being reasonable (10 s), the MLP goes on to a million rows.
"""

import time

import numpy as np
import torch
from common import fit, plt, save, start
from sklearn.svm import SVC

from mlpkit.nn import MLP

SIZES = [1000, 4000, 16_000, 64_000, 250_000, 1_000_000]
SETTINGS = {"SVM": [0.001, 0.01, 0.1, 1.0, 10.0], "MLP": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}


def draw(rows, seed):
    """Ten inputs, two classes, a curved border and 5 % wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 10, generator=generator)
    y = (x[:, 0] * x[:, 1] + x[:, 2].sin() * 2 > 0).long()
    return x, torch.where(torch.rand(rows, generator=generator) < 0.05, 1 - y, y)


def score(kind, setting, x, y, x_test, y_test, epochs):
    """Accuracy and seconds of CPU time. setting: gamma of the SVM, learning rate of the MLP."""
    begin = time.process_time()
    if kind == "SVM":
        guess = torch.tensor(SVC(gamma=setting).fit(x.numpy(), y.numpy()).predict(x_test.numpy()))
        seconds = time.process_time() - begin
    else:
        torch.manual_seed(0)
        model = MLP(10, (32,), 2)
        fit(model, x, y, epochs=epochs, lr=setting, batch_size=256)
        seconds = time.process_time() - begin
        guess = model(x_test).argmax(1)
    return (guess == y_test).float().mean().item(), seconds


def main(out=None, sizes=SIZES):
    x_test, y_test = draw(1000, 1)
    found = {}
    figure, (left, right) = plt.subplots(1, 2)
    for kind, settings in SETTINGS.items():
        scores = [score(kind, s, *draw(1000, 0), x_test, y_test, 50)[0] for s in settings]
        found[kind] = {"scores": scores, "seconds": {}, "large": {}}
        print(
            f"{kind} over five settings: "
            + ", ".join(f"{s:.3f}" for s in scores)
            + f"; range {max(scores) - min(scores):.3f}"
        )
        best = settings[int(np.argmax(scores))]
        for rows in sizes:
            if kind == "SVM" and 20 * found[kind]["seconds"].get(rows // 4, 0) > 10:
                break  # four times the rows would take about 16 to 20 times as long
            epochs = max(1, 200_000 // rows)
            accuracy, found[kind]["seconds"][rows] = score(kind, best, *draw(rows, 0), x_test, y_test, min(50, epochs))
            found[kind]["large"][rows] = accuracy
            print(f"  {rows:9,} rows: accuracy {accuracy:.3f} in {found[kind]['seconds'][rows]:.2f} s")
        left.plot(range(5), scores, "o-", label=kind)
        right.loglog(list(found[kind]["seconds"]), list(found[kind]["seconds"].values()), "o-", label=kind)
    left.set_xticks(range(5), [f"{g}\n{lr:g}" for g, lr in zip(*SETTINGS.values())])
    left.set(xlabel="gamma of the SVM / learning rate of the MLP", ylabel="test accuracy")
    right.set(xlabel="rows", ylabel="s to train")
    left.legend()
    save(figure, out)
    print(
        "The SVM was left at the size where the next would have taken more than 10 s; the MLP saw each row "
        "of a million once."
    )
    return found


if __name__ == "__main__":
    start(main)
