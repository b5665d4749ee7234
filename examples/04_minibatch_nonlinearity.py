"""What if a nonlinearity acts on a whole minibatch?

Batch normalisation does: each row is divided by what its neighbours are. So the answer for one row depends on the
company it keeps, a batch of one has no answer at all, and a network must be told whether it trains or predicts.
"""

import torch
from common import BLUE, ORANGE, digits, fit, plt, save, start

from mlpkit.errors import MlpkitError
from mlpkit.nn import MLP


def spread(model, row, others, trials=200):
    """Standard deviation of one row's largest logit over random companies of 15 other rows."""
    logits = torch.stack(
        [model(torch.cat([row, others[torch.randperm(len(others))[:15]]]))[0].detach() for _ in range(trials)]
    )
    return logits[:, logits.mean(0).argmax()]


def main(out=None):
    data = digits()
    torch.manual_seed(0)
    model = MLP(64, (64,), 10, norm="batch")
    fit(model, data.x, data.y, epochs=10)
    row = data.x_test[:1]
    answers = {"training mode": spread(model.train(), row, data.x), "eval mode": spread(model.eval(), row, data.x)}
    found = {name: values.std().item() for name, values in answers.items()}
    for name, value in found.items():
        print(f"{name:13}: one row's logit varies by {value:.2g} with the 15 rows beside it")

    try:
        model.train()(row)
        found["alone"] = "an answer"
    except (ValueError, MlpkitError) as error:
        found["alone"] = str(error)
    print(f"a batch of one row in training: {found['alone']}")
    print("A nonlinearity over the batch ties rows together; running averages cut the tie at test time.")

    figure, panel = plt.subplots()
    panel.hist(answers["training mode"], bins=30, color=ORANGE, label="training mode: 200 companies")
    panel.axvline(answers["eval mode"][0], color=BLUE, label="eval mode: always this")
    panel.set(xlabel="largest logit of one and the same row", ylabel="companies")
    panel.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
