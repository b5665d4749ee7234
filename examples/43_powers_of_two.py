"""Must a width be a power of two?

Widths 96 to 130, one forward and backward pass each, in interleaved rounds on one thread of this machine. Time follows
the arithmetic, about the square of the width; vector units prefer multiples of 16, and 128 is only one of them.
"""

import statistics
import time

import torch
from common import GREY, plt, save, start

from mlpkit.nn import MLP

WIDTHS = sorted({*range(96, 131, 2), 97, 127, 129})
ROUNDS = 7


def seconds(model, x, repeats=4):
    begin = time.process_time()
    for _ in range(repeats):
        model(x).sum().backward()
    return (time.process_time() - begin) / repeats


def main(out=None):
    torch.manual_seed(0)
    models = {width: MLP(width, (width, width), width) for width in WIDTHS}
    inputs = {width: torch.randn(256, width) for width in WIDTHS}
    times = {width: [] for width in WIDTHS}
    for width in WIDTHS:
        seconds(models[width], inputs[width])
    for _ in range(ROUNDS):
        for width in WIDTHS:
            times[width].append(seconds(models[width], inputs[width]))
    found = {width: statistics.median(times[width]) for width in WIDTHS}
    per_product = {width: found[width] / width**2 for width in WIDTHS}
    typical = statistics.median(per_product.values())
    for width in (96, 112, 127, 128, 129, 130):
        print(
            f"width {width}: {found[width] * 1e6:5.0f} us, {per_product[width] / typical:.2f} of the typical "
            f"time per product"
        )
    neighbours = statistics.mean([per_product[126], per_product[130]]) / per_product[128]
    print(
        f"126 and 130 take {neighbours:.2f} times as long per product as 128 in this run: choose by score, then round."
    )

    figure, panel = plt.subplots()
    panel.plot(WIDTHS, [found[w] * 1e6 for w in WIDTHS], "o-")
    for width in (96, 112, 128):
        panel.axvline(width, color=GREY, linestyle=":")
    panel.set(xlabel="width (dotted: multiples of 16)", ylabel="us of CPU time", ylim=(0, None))
    save(figure, out)
    return {"seconds": found, "neighbours": neighbours}


if __name__ == "__main__":
    start(main)
