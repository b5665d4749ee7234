"""Proposals carried out: gone, still there, or not tried."""

import pytest
import torch
from corpus import CASES, VARIANTS, execute

from mlpkit.trace import Tracer

HOLDS = {
    "log_of_a_count": "clamp",
    "log_of_a_softmax": "log_domain",
    "normalise_a_zero_row": "safe_where",
    "angle_of_rounded_cosine": "clamp",
    "fully_masked_row": "mask_finite",
    "mean_of_no_positives": "guard_count",
    "every_token_ignored": "guard_count",
    "eps_vanishes_in_half": "eps",
    "layer_norm_without_eps": "eps",
    "root_of_zero": "safe_where",
    "learning_rate_too_high": "lower_lr",
    "infinite_learning_rate": "hyperparameter",
    "softmax_by_hand": "log_domain",
}


def verified(name, variant=VARIANTS[0]):
    program = lambda: execute(CASES[name], variant)  # noqa: E731
    with Tracer() as tracer:
        program()
    return tracer, tracer.verify(program)


@pytest.mark.parametrize("name", HOLDS)
def test_a_proposal_that_helps_is_verified(name):
    tracer, found = verified(name)
    assert (HOLDS[name], True) in [(fix["kind"], fix["verified"]) for fix in found.fix]
    assert tracer.diagnosis is found
    assert tracer.to_dict()["fix"] == found.fix


def test_a_proposal_that_does_not_help_says_so():
    _, found = verified("negative_running_variance")
    assert [fix["verified"] for fix in found.fix if fix["kind"] == "clamp"] != [True]


def test_what_cannot_be_carried_out_stays_open():
    _, found = verified("nan_target")
    assert [fix["verified"] for fix in found.fix] == [None]


def test_a_healthy_run_has_nothing_to_verify():
    calls = []
    with Tracer() as tracer:
        torch.ones(2).sum().item()
    assert tracer.verify(lambda: calls.append(1)).verdict == "healthy"
    assert not calls


def test_random_numbers_go_on_as_if_nothing_had_been_run():
    torch.manual_seed(3)
    expected = torch.rand(2)
    program = lambda: torch.log(torch.zeros(2)).sum().item() + torch.rand(3).sum().item()  # noqa: E731
    with Tracer() as tracer:
        program()
    torch.manual_seed(3)
    tracer.verify(program)
    assert torch.equal(torch.rand(2), expected)
