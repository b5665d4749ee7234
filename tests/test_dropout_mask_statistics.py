"""The dropout mask as random numbers: 100 million draws a test through the public op; seeds are fixed."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch

from mlpkit.functional import linear_act_dropout

# How often a test would fail for a perfect generator, over all that it compares.
FALSE_ALARMS = 1e-3


def limit(comparisons):
    """What the largest of so many normal scores exceeds in size with a probability of FALSE_ALARMS (Bonferroni)."""
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / comparisons)


def realised(p):
    """The probability of being kept: p is rounded to 65536ths."""
    return 1 - math.floor(65536 * p + 0.5) / 65536


def output(rows, cols, p, seed, offset=0, stream=0):
    """y where z is 1 everywhere: the mask times its scale."""
    x, weight = torch.ones(rows, 1), torch.ones(cols, 1)
    return linear_act_dropout(x, weight, activation="identity", p=p, seed=torch.tensor([seed, offset]), stream=stream)


def centred(rows, cols, p, **place):
    """The mask less its expectation."""
    return (output(rows, cols, p, **place) != 0).float() - realised(p)


def scores(parts, p):
    """Correlation of each pair of masks in standard errors; parts: tensors (masks, elements) of centred masks.

    The expectation is known and not estimated, so that products of different elements are uncorrelated.
    """
    products, elements = 0.0, 0
    for part in parts:
        products = products + (part @ part.T).double()
        elements += part.shape[1]
    kept = realised(p)
    above, below = torch.triu_indices(*products.shape, 1)
    return products[above, below].abs() / (kept * (1 - kept) * math.sqrt(elements))


def assert_independent(parts, p):
    found = scores(parts, p)
    assert found.max() < limit(len(found)), f"{found.max():.2f} standard errors in {len(found)} pairs"


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_100_million_draws_keep_what_p_says_and_leave_the_mean(p):
    """8-bit thresholds miss by 0.26 % at p = 0.1; four standard errors of the mean are 0.013 % there."""
    elements, kept, total = 0, 0, 0.0
    for offset in range(25):
        y = output(1024, 4096, p, seed=2026, offset=offset)
        elements += y.numel()
        kept += int(y.count_nonzero())
        total += y.sum(dtype=torch.float64).item()
    assert elements > 1e8
    expected = realised(p)
    assert abs(expected - (1 - p)) <= 0.5 / 65536
    standard_error = math.sqrt(expected * (1 - expected) / elements)
    assert abs(kept / elements - expected) < 4 * standard_error
    assert abs(total / elements - 1) < 4 * standard_error / expected


@pytest.mark.parametrize("varied", ["seed", "high half of seed", "offset", "stream"])
def test_masks_of_64_seeds_steps_and_layers_are_independent(varied):
    def parts():
        for part in range(12):
            # What is not varied changes from part to part.
            place = {"seed": 1000 + part, "offset": part, "stream": part}
            masks = []
            for i in range(64):
                changed = {"seed": 1000 + part + (i << 32)} if varied.startswith("high") else {varied: i}
                masks.append(centred(256, 512, 0.3, **(place | changed)).flatten())
            yield torch.stack(masks)

    assert_independent(parts(), 0.3)


def test_a_correlation_of_half_a_percent_is_seen():
    def parts():
        for part in range(12):
            mask, other = (centred(256, 512, 0.3, seed=seed, offset=part) for seed in (1, 2))
            for_once = output(256, 512, 0.995, seed=3, offset=part) != 0
            yield torch.stack([mask.flatten(), torch.where(for_once, mask, other).flatten()])

    assert scores(parts(), 0.3).max() > limit(1)


@pytest.mark.parametrize("across", ["row tiles", "column tiles", "rows of a tile", "columns of a tile"])
def test_tiles_and_places_within_them_are_independent(across):
    """A generator that forgets the row block repeats its mask every 16 rows."""
    order = {
        "row tiles": (0, 1, 2, 3),
        "column tiles": (2, 0, 1, 3),
        "rows of a tile": (1, 0, 2, 3),
        "columns of a tile": (3, 0, 1, 2),
    }[across]

    def parts():
        for offset in range(25):
            tiles = centred(2048, 2048, 0.3, seed=5, offset=offset).reshape(128, 16, 128, 16).permute(order)
            yield tiles.reshape(tiles.shape[0], -1)

    assert_independent(parts(), 0.3)


def test_places_within_a_tile_are_independent():
    def parts():
        for offset in range(25):
            places = centred(2048, 2048, 0.3, seed=6, offset=offset).reshape(128, 16, 128, 16)
            yield places.permute(1, 3, 0, 2).reshape(256, -1)

    assert_independent(parts(), 0.3)


LAGS = [lag for lag in itertools.product([0, 1, 2, 8, 15, 16], repeat=2) if any(lag)]


def test_neighbouring_elements_are_independent():
    """Down and to the right by every distance that the layout of a tile makes special."""
    products, elements = dict.fromkeys(LAGS, 0.0), dict.fromkeys(LAGS, 0)
    for offset in range(25):
        mask = centred(2048, 2048, 0.1, seed=8, offset=offset)
        for down, right in LAGS:
            near, far = mask[: 2048 - down, : 2048 - right], mask[down:, right:]
            products[down, right] += (near * far).sum(dtype=torch.float64).item()
            elements[down, right] += near.numel()
    variance = realised(0.1) * (1 - realised(0.1))
    for lag in LAGS:
        score = abs(products[lag]) / (variance * math.sqrt(elements[lag]))
        assert score < limit(len(LAGS)), f"{score:.2f} standard errors at {lag}"
