"""How sure is the network?

Keep dropout on at test time and ask many times (Monte-Carlo dropout). Where the answers disagree the network does not
know: on digits that it gets wrong, and on noise. The average over passes comes close to one pass in eval mode.
"""

import torch
from common import GREEN, ORANGE, RED, digits, fit, plt, save, start

from mlpkit.nn import MLP, predict_mc


def main(out=None):
    data = digits(600)
    torch.manual_seed(0)
    model = MLP(64, (128, 128), 10, dropout=0.3)
    fit(model, data.x, data.y, epochs=30, lr=2e-3)
    guess = predict_mc(model, data.x_test, samples=100, logits=True, seed=1)
    right = guess.mean.argmax(1) == data.y_test
    noise = torch.rand(500, 64, generator=torch.Generator().manual_seed(0))
    groups = {
        "right": guess.mutual_information[right],
        "wrong": guess.mutual_information[~right],
        "noise": predict_mc(model, noise, samples=100, logits=True, seed=1).mutual_information,
    }
    found = {name: values.mean().item() for name, values in groups.items()}
    for name, values in groups.items():
        print(f"{name:5} ({len(values)} rows): mutual information {found[name]:.3f} nats")

    with torch.no_grad():
        once = model.eval()(data.x_test).softmax(1)
        found["difference"] = {}
        for samples in (2, 10, 100, 400):
            mean = predict_mc(model, data.x_test, samples=samples, logits=True, seed=2).mean
            found["difference"][samples] = (mean - once).abs().mean().item()
    print(
        "mean distance of averaged passes from eval: "
        + ", ".join(f"{value:.4f} with {samples}" for samples, value in found["difference"].items())
    )
    found["agree"] = (once.argmax(1) == guess.mean.argmax(1)).float().mean().item()
    print(f"Eval and the average of 100 passes give the same class on {found['agree']:.1%} of the test rows.")

    figure, panel = plt.subplots()
    bins = torch.linspace(0, 0.8, 41).tolist()
    for (name, values), colour in zip(groups.items(), (GREEN, RED, ORANGE)):
        panel.hist(values, bins=bins, density=True, alpha=0.6, color=colour, label=name)
    panel.set(xlabel="mutual information (nats): what the passes disagree on", ylabel="density", ylim=(0, 12))
    panel.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
