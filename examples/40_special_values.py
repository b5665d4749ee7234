"""Where do NaN and Inf come from, one by one?

Eight innocent operations, each traced: the tracer names the operation that went wrong first, and the causes in order.
"""

import torch
from common import plt, save, start

from mlpkit.trace import Tracer

LARGE = 60000.0  # float16 ends at 65504


def half(*values):
    return torch.tensor(values, dtype=torch.float16)


CASES = {
    "60000 + 60000": lambda: half(LARGE) + half(LARGE),
    "Inf - Inf": lambda: (half(LARGE) * 2) - (half(LARGE) * 2),
    "0 * Inf": lambda: half(0.0) * (half(LARGE) * 2),
    "Inf / Inf": lambda: (half(LARGE) * 2) / (half(LARGE) * 2),
    "0 / 0": lambda: half(0.0) / half(0.0),
    "1 / 0": lambda: half(1.0) / half(0.0),
    "sqrt(-1)": lambda: half(-1.0).sqrt(),
    "log(0)": lambda: half(0.0).log(),
}


def main(out=None):
    found, table_rows = {}, []
    for name, compute in CASES.items():
        with Tracer() as tracer:
            value = float(compute().sum())
        diagnosis = tracer.diagnosis.to_dict()
        causes = [link["cause"] for link in diagnosis["chain"] if link["cause"]]
        found[name] = {"value": value, "cause": diagnosis["cause"], "op": diagnosis["op"], "causes": causes}
        chain = " -> ".join(dict.fromkeys([diagnosis["cause"], *causes]))
        table_rows.append([name, str(value), diagnosis["op"], chain])
        print(f"{name:14} = {value!s:4}  {diagnosis['op']}: {chain}")
    print("An Inf that meets another Inf, or a zero, becomes NaN; the tracer points at the operation before that.")

    figure, panel = plt.subplots(figsize=(8, 3.6))
    titles = ["computed", "gives", "first wrong op", "causes in order"]
    table = panel.table(table_rows, colLabels=titles, loc="center", cellLoc="left", colWidths=[0.2, 0.1, 0.2, 0.5])
    table.scale(1, 1.3)
    for cell in table.get_celld().values():
        cell.set(edgecolor="#d9dee3", facecolor="#ffffff")
        cell.get_text().set_color("#24292f")
    panel.axis("off")
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
