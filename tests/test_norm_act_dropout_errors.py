"""norm_act_dropout on arguments that do not fit: the error's class, and what the sentence says came and must come."""

import math

import pytest
import torch

from mlpkit import errors
from mlpkit.functional import norm_act_dropout

Z, ONES = torch.ones(2, 4), torch.ones(4)
AVERAGES = {"running_mean": ONES, "running_var": ONES}

# Name of the case: error class, what the message must contain, the arguments that differ from a good call.
CASES = {
    "an unknown norm": (errors.ArgumentError, ["norm", "'instance'", "batch, layer, or None"], {"norm": "instance"}),
    "z without features": (errors.ShapeError, ["z", "no dimensions"], {"z": torch.tensor(1.0)}),
    "integers": (errors.DtypeError, ["z", "int64", "float32"], {"z": Z.long()}),
    "a weight of another length": (errors.ShapeError, ["weight", "(3,)", "(4,)"], {"weight": torch.ones(3)}),
    "a bias of two dimensions": (errors.ShapeError, ["bias", "(1, 4)", "(4,)"], {"bias": torch.ones(1, 4)}),
    "a weight of another dtype": (
        errors.DtypeError,
        ["weight", "float64", "z's", "float32"],
        {"weight": ONES.double()},
    ),
    "a weight elsewhere": (errors.DeviceError, ["weight", "meta", "z's", "cpu"], {"weight": ONES.to("meta")}),
    "a weight without a norm": (errors.ArgumentError, ["weight", "norm is None"], {"norm": None, "weight": ONES}),
    "one average": (errors.ArgumentError, ["running_var is None", "together"], {"running_mean": ONES}),
    "averages of layer norm": (errors.ArgumentError, ["running_mean", "'layer'"], {"norm": "layer", **AVERAGES}),
    "averages of another length": (
        errors.ShapeError,
        ["running_mean", "(3,)", "(4,)"],
        {"running_mean": torch.ones(3), "running_var": torch.ones(3)},
    ),
    "no averages without training": (errors.ArgumentError, ["running_mean is None", "training"], {"training": False}),
    "no averages though frozen": (errors.ArgumentError, ["running_mean is None"], {"frozen": True}),
    "no momentum": (errors.ArgumentError, ["momentum is None", "cumulative"], {"momentum": None, **AVERAGES}),
    "a momentum above 1": (errors.ArgumentError, ["momentum is 1.5", "[0, 1]"], {"momentum": 1.5, **AVERAGES}),
    "a negative eps": (errors.ArgumentError, ["eps is -1.0", "at least 0"], {"eps": -1.0}),
    "an eps of NaN": (errors.ArgumentError, ["eps is nan"], {"eps": math.nan}),
    "a single row": (errors.ShapeError, ["Expected more than 1 value per channel when training"], {"z": Z[:1]}),
    "p above 1": (errors.ArgumentError, ["p", "1.5", "[0, 1]"], {"p": 1.5}),
    "p out of range though not training": (errors.ArgumentError, ["p", "2"], {"p": 2, "training": False, **AVERAGES}),
    "an unknown activation": (errors.ArgumentError, ["activation", "'swish'", "relu"], {"activation": "swish"}),
    "prelu without slope": (errors.ArgumentError, ["slope", "prelu", "tensor"], {"activation": "prelu"}),
    "relu with a slope": (errors.ArgumentError, ["slope", "relu"], {"slope": 0.1}),
    "a seed of text": (errors.ArgumentError, ["seed", "'7'", "int"], {"p": 0.5, "seed": "7"}),
    "a seed elsewhere": (errors.DeviceError, ["seed", "meta"], {"p": 0.5, "seed": torch.ones(2).long().to("meta")}),
    "a negative stream": (errors.ArgumentError, ["stream", "-1"], {"p": 0.5, "seed": 1, "stream": -1}),
    "a sparse z": (errors.ArgumentError, ["z", "sparse", "strided"], {"z": Z.to_sparse()}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused_in_one_sentence_and_changes_nothing(name):
    error, fragments, differing = CASES[name]
    arguments = {"z": Z, "norm": "batch"} | differing
    before = {name: t.clone() for name, t in arguments.items() if name.startswith("running")}
    with pytest.raises(error) as caught:
        norm_act_dropout(arguments.pop("z"), arguments.pop("norm"), **arguments)
    message = str(caught.value)
    assert message.startswith("norm_act_dropout: "), message
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is missing in: {message}"
    assert all(torch.equal(arguments[name], tensor) for name, tensor in before.items())
