"""mlpkit in three minutes: tune two tables, survive an fp16 overflow, and read why.

python examples/demo.py                                        two tables bundled with scikit-learn
python examples/demo.py data.csv --target price                a table of yours instead
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits

from mlpkit.errors import MlpkitError
from mlpkit.guard import TrainStep
from mlpkit.nn import MLP
from mlpkit.trace import Tracer
from mlpkit.tune import read_csv, tune


def tune_tables(args: argparse.Namespace) -> list[Path]:
    """Climb from the linear baseline on each table; print the verdict and write a run directory."""
    if args.csv:
        tables = {args.csv.stem: (read_csv(args.csv), args.target)}
    else:
        tables = {
            "digits (classification)": load_digits(as_frame=True, return_X_y=True),
            "diabetes (regression)": load_diabetes(as_frame=True, return_X_y=True),
        }
    pages = []
    for name, (features, target) in tables.items():
        print(f"\n--- tune: {name}, {len(features)} rows")
        folder = args.out / name.split(" ")[0]
        run = tune(features, target, budget=args.budget, random_state=0, out=folder, overwrite=True)
        print("\n".join(f"  {verdict.text}" for verdict in run.verdicts))
        pages.append(folder / "report.html")
    return pages


def survive_overflow(args: argparse.Namespace) -> Path:
    """Train in fp16 with one batch planted to overflow: the step is skipped, the culprit named, training goes on."""
    print("\n--- guard and trace: fp16 training with a batch planted to overflow at step 6")
    torch.manual_seed(0)
    model = MLP(64, (256, 128), 10, activation="gelu", dropout=0.1, init="he_normal")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = TrainStep(model, "cross_entropy", optimizer, precision="fp16", init_scale=1024.0)
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    with Tracer(model) as tracer:
        for number in range(12):
            tracer.next_step()
            rows = torch.randint(len(inputs), (64,))
            batch = inputs[rows] * (6e4 if number == 6 else 1.0)
            result = step(batch, targets[rows])
            state = f"skipped, culprit: {result.culprit}" if result.skipped else f"loss {result.loss:.3f}"
            print(f"  step {number:2d}  {state}")
    print(f"  {tracer.diagnosis.sentence}")
    page = args.out / "overflow.html"
    tracer.report(page)
    return page


def main() -> None:
    """Run the demo and end with the paths of its pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?", type=Path, help="a table of yours instead of the bundled ones")
    parser.add_argument("--target", help="the column to predict")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each table")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the pages")
    args = parser.parse_args()
    if bool(args.csv) != bool(args.target):
        parser.error("a table and --target go together")
    try:
        pages = [*tune_tables(args), survive_overflow(args)]
    except MlpkitError as error:
        parser.exit(2, f"demo: {error}\n")
    print("\nReports to open in a browser:")
    for page in pages:
        print(f"  {page.resolve()}")


if __name__ == "__main__":
    main()
