"""How many layers does this table need?

Climb: a linear model first, then one hidden layer, then two, and keep a rung only if it gains more than one standard
error over the simpler one. `mlpkit.tune` does so with folds drawn once. Diabetes stays linear, two rings do not.
"""

import contextlib
import io

import pandas as pd
from common import plt, save, start
from sklearn.datasets import load_diabetes, make_circles

from mlpkit.tune import tune


def rings():
    x, y = make_circles(160, noise=0.1, factor=0.5, random_state=0)
    return pd.DataFrame(x, columns=["x", "y"]), pd.Series(y, name="ring")


def main(out=None):
    found = {}
    tables = {"diabetes": [part[:250] for part in load_diabetes(as_frame=True, return_X_y=True)], "rings": rings()}
    figure, panels = plt.subplots(1, 2)
    for panel, (name, (features, target)) in zip(panels, tables.items()):
        with contextlib.redirect_stderr(io.StringIO()):  # the progress lines
            run = tune(features, target, cv=3, budget=600, random_state=0)
        rungs = {}
        for trial in run.study.trials:
            rungs.setdefault(trial.params["layers"], []).append(trial.value)
        found[name] = {"verdict": run.verdicts[0].text, "best": {layers: max(v) for layers, v in rungs.items()}}
        print(f"{name}: {found[name]['verdict']}")
        for layers, values in rungs.items():
            panel.plot([layers] * len(values), values, "o", alpha=0.7)
        panel.set_xticks(sorted(rungs))
        panel.set(title=name, xlabel="hidden layers", ylabel=run.metric)
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
