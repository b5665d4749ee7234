"""2,000 training steps by nn.MLP and guard.TrainStep learn like a plain PyTorch loop, within the noise of the seeds.

For each recipe and seed both sides start from the same parameters and see the same batches; six numbers of the curves
are compared by a two-sided paired t-test. Seeds are fixed, so the outcome is too.
"""

import pytest
from learning_runs import SEEDS, Recipe, eager, ours, scores
from scipy.stats import t as student

RECIPES = [
    Recipe("fp32", 0.0),
    Recipe("fp32", 0.3),
    Recipe("bf16", 0.0),
    Recipe("bf16", 0.3),
    Recipe("fp16", 0.3),
]
# How often any of the numbers of any recipe would be called different, were both sides the same (Bonferroni).
FALSE_ALARMS = 0.01
NUMBERS = 6


def limit(seeds):
    return student.isf(FALSE_ALARMS / (2 * NUMBERS * len(RECIPES)), len(seeds) - 1)


def largest_score(recipe, of=None, change=None):
    """How far our curves (of another recipe, or with a flaw planted) lie from PyTorch's of this one."""
    seeds = SEEDS[recipe.precision]
    found = scores([ours(of or recipe, seed, change) for seed in seeds], [eager(recipe, seed) for seed in seeds])
    assert len(found) == NUMBERS
    return max(map(abs, found))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_curves_differ_from_pytorchs_by_seed_noise_alone(recipe):
    assert largest_score(recipe) < limit(SEEDS[recipe.precision])


def without_bias_gradients(model):
    for layer in model.layers:
        layer.bias.requires_grad_(False)


def without_the_scale(model):
    keep = 1 - model.layers[0].dropout
    model.layers[0].register_forward_hook(lambda layer, _, y: y * keep if layer.training else y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "of", "flaw"),
    [
        (Recipe("fp32", 0.0), None, without_bias_gradients),
        (Recipe("fp32", 0.3), None, without_the_scale),
        (Recipe("fp32", 0.3), Recipe("fp32", 0.35), None),
    ],
    ids=["bias gradients dropped", "dropout without its scale", "p of 0.35 and not 0.3"],
)
def test_a_planted_flaw_is_told_from_seed_noise(recipe, of, flaw):
    assert largest_score(recipe, of, flaw) > limit(SEEDS[recipe.precision])
