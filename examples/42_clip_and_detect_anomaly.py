"""Clipping, detect_anomaly or a tracer: who explains a NaN?

One failure: the slope of sqrt at 0 is Inf. Clipping leaves NaN in every gradient; detect_anomaly sees NaN alone, so it
blames the square before; the tracer finds the division by 0; the guarded step skips it whole. And (-Inf)^0.5, twice.
"""

import math
import warnings

import torch
from common import plt, save, start

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP
from mlpkit.trace import Tracer


def build():
    torch.manual_seed(0)
    model = MLP(4, (8,), 2)
    return model, torch.randn(16, 4)


def distance(output, target):
    """Root of the squared error: its slope at 0 is 1 / 0, and 0 * Inf is NaN."""
    return (output - target).square().sum(1).sqrt().mean()


def main(out=None):
    model, x = build()
    y = model(x).detach()  # a perfect guess in every row: the loss is 0 and its slope is not
    found = {}
    distance(model(x), y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    found["clipped"] = sum(bool(p.grad.isnan().any()) for p in model.parameters())
    print(
        f"clip_grad_norm_: {found['clipped']} of {len(list(model.parameters()))} gradients hold NaN: it "
        f"cannot clip what is no number"
    )

    model, x = build()
    try:
        with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True, check_nan=True):
            warnings.simplefilter("ignore")  # it prints the forward's traceback as a warning
            distance(model(x), y).backward()
        found["anomaly"] = "nothing"
    except RuntimeError as error:
        found["anomaly"] = str(error)
    print(f"detect_anomaly: {found['anomaly']}")

    model, x = build()
    before = [p.detach().clone() for p in model.parameters()]
    step = TrainStep(model, distance, torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=1.0)
    with Tracer(model) as tracer:
        result = step(x, y)
    found["skipped"] = result.skipped
    found["kept"] = all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    found["cause"], found["op"] = tracer.diagnosis.cause, tracer.diagnosis.op
    print(f"tracer: {tracer.diagnosis.sentence}")
    print(
        f"guarded step: skipped {result.skipped}, culprit {result.culprit}, parameters kept bit for bit: "
        f"{found['kept']}"
    )

    minus_infinity = torch.tensor(-math.inf)
    found["sqrt"], found["pow"] = minus_infinity.sqrt().item(), minus_infinity.pow(torch.tensor(0.5)).item()
    print(f"(-Inf)^0.5: sqrt says {found['sqrt']}, pow says {found['pow']}: IEEE 754 defines both so")

    figure, panel = plt.subplots()
    u = torch.logspace(-12, 0, 100, dtype=torch.float64)
    panel.loglog(u, 0.5 / u.sqrt(), label="slope of sqrt(u)")
    panel.loglog(u, 0.5 / (u + 1e-6).sqrt(), label="slope of sqrt(u + 1e-6): bounded")
    panel.set(xlabel="u", ylim=(1e-1, 1e7))
    panel.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
