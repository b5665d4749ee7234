"""linear_act_dropout on arguments that do not fit: the error's class, what the sentence says came and must come."""

import math

import pytest
import torch

from mlpkit import errors
from mlpkit.functional import linear_act_dropout
from mlpkit.reference import ACTIVATIONS

X, WEIGHT, BIAS = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)

# Name of the case: error class, what the message must contain, the arguments that differ from a good call.
CASES = {
    "x of too few features": (errors.ShapeError, ["x", "5", "weight", "4"], {"x": torch.ones(2, 5)}),
    "x without features": (errors.ShapeError, ["x", "no dimensions", "in_features"], {"x": torch.tensor(1.0)}),
    "weight of one dimension": (errors.ShapeError, ["weight", "(4,)"], {"weight": torch.ones(4)}),
    "weight of three dimensions": (errors.ShapeError, ["weight", "(1, 3, 4)"], {"weight": torch.ones(1, 3, 4)}),
    "bias of another length": (errors.ShapeError, ["bias", "(4,)", "3"], {"bias": torch.ones(4)}),
    "bias of two dimensions": (errors.ShapeError, ["bias", "(1, 3)", "3"], {"bias": torch.ones(1, 3)}),
    "integers": (errors.DtypeError, ["x", "int64", "float32", "bfloat16", "float16", "float64"], {"x": X.long()}),
    "complex numbers": (errors.DtypeError, ["x", "complex64", "float32"], {"x": X.cfloat()}),
    "weight of another dtype": (errors.DtypeError, ["weight", "float64", "x", "float32"], {"weight": WEIGHT.double()}),
    "bias of another dtype": (errors.DtypeError, ["bias", "float16", "float32"], {"bias": BIAS.half()}),
    "weight elsewhere": (errors.DeviceError, ["weight", "meta", "x", "cpu"], {"weight": WEIGHT.to("meta")}),
    "bias elsewhere": (errors.DeviceError, ["bias", "meta", "cpu"], {"bias": BIAS.to("meta")}),
    "p below 0": (errors.ArgumentError, ["p", "-0.1", "[0, 1]"], {"p": -0.1}),
    "p above 1": (errors.ArgumentError, ["p", "1.5", "[0, 1]"], {"p": 1.5}),
    "p of NaN": (errors.ArgumentError, ["p", "nan", "[0, 1]"], {"p": math.nan}),
    "p of text": (errors.ArgumentError, ["p", "'a'", "[0, 1]"], {"p": "a"}),
    "no weight": (errors.ArgumentError, ["weight", "NoneType", "tensor"], {"weight": None}),
    "a sparse x": (errors.ArgumentError, ["x", "sparse", "strided"], {"x": X.to_sparse()}),
    "a slope of NaN": (errors.ArgumentError, ["slope", "nan"], {"activation": "leaky_relu", "slope": math.nan}),
    "a slope of text": (errors.ArgumentError, ["slope", "'a'"], {"activation": "leaky_relu", "slope": "a"}),
    "p out of range though not training": (errors.ArgumentError, ["p", "2", "[0, 1]"], {"p": 2, "training": False}),
    "an unknown activation": (errors.ArgumentError, ["activation", "'swish'", *ACTIVATIONS], {"activation": "swish"}),
    "a seed of floats": (errors.ArgumentError, ["seed", "float32", "int64"], {"p": 0.5, "seed": torch.ones(2)}),
    "a seed of one word": (
        errors.ArgumentError,
        ["seed", "(1,)", "(2,)", "offset"],
        {"p": 0.5, "seed": torch.ones(1).long()},
    ),
    "a seed elsewhere": (
        errors.DeviceError,
        ["seed", "meta", "cpu"],
        {"p": 0.5, "seed": torch.ones(2).long().to("meta")},
    ),
    "a seed beyond 64 bits": (errors.ArgumentError, ["seed", str(2**64), "64"], {"p": 0.5, "seed": 2**64}),
    "a seed of text": (errors.ArgumentError, ["seed", "'7'", "int"], {"p": 0.5, "seed": "7"}),
    "a negative stream": (errors.ArgumentError, ["stream", "-1"], {"p": 0.5, "seed": 1, "stream": -1}),
    "a stream beyond 32 bits": (errors.ArgumentError, ["stream", str(2**32)], {"p": 0.5, "seed": 1, "stream": 2**32}),
    "prelu without slope": (errors.ArgumentError, ["slope", "prelu", "tensor"], {"activation": "prelu"}),
    "prelu with a number": (errors.ArgumentError, ["slope", "prelu", "tensor"], {"activation": "prelu", "slope": 0.1}),
    "prelu with two slopes for three features": (
        errors.ShapeError,
        ["slope", "(2,)", "1", "3"],
        {"activation": "prelu", "slope": torch.ones(2)},
    ),
    "prelu with a slope of another dtype": (
        errors.DtypeError,
        ["slope", "float64", "float32"],
        {"activation": "prelu", "slope": torch.ones(1).double()},
    ),
    "prelu with a slope elsewhere": (
        errors.DeviceError,
        ["slope", "meta", "cpu"],
        {"activation": "prelu", "slope": torch.ones(1, device="meta")},
    ),
    "leaky_relu with a tensor": (
        errors.ArgumentError,
        ["slope", "leaky_relu", "float"],
        {"activation": "leaky_relu", "slope": torch.ones(1)},
    ),
    "relu with a slope": (errors.ArgumentError, ["slope", "relu"], {"slope": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused_in_one_sentence(name):
    error, fragments, differing = CASES[name]
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS} | differing
    with pytest.raises(error) as caught:
        linear_act_dropout(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
    message = str(caught.value)
    assert message.startswith("linear_act_dropout: "), message
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is missing in: {message}"


@pytest.mark.parametrize("builtin", [ValueError, TypeError])
def test_errors_are_the_built_in_ones_a_caller_expects(builtin):
    arguments = {ValueError: {"p": 3.0}, TypeError: {"weight": WEIGHT.double()}}[builtin]
    with pytest.raises(builtin) as caught:
        linear_act_dropout(X, arguments.pop("weight", WEIGHT), **arguments)
    assert isinstance(caught.value, errors.MlpkitError)


@pytest.mark.parametrize("p", [-1.0, 2.0, math.nan])
def test_the_bare_op_refuses_a_bad_p_too(p):
    with pytest.raises((RuntimeError, ValueError), match=r"\[0, 1\]"):
        torch.ops.mlpkit.linear_act_dropout(X, WEIGHT, BIAS, None, torch.tensor([1, 0]), "relu", 0.01, p, 0)


def test_the_bare_op_refuses_what_would_read_past_a_tensor():
    """The dispatcher's op is public too: wrong shapes may not crash the process."""
    op = torch.ops.mlpkit.linear_act_dropout
    words = torch.tensor([1, 0])
    for arguments in [
        (torch.ones(2, 5), WEIGHT, BIAS, None, words, "relu", 0.01, 0.5, 0),
        (X, WEIGHT, torch.ones(2), None, words, "relu", 0.01, 0.5, 0),
        (X, WEIGHT, BIAS, torch.ones(2), words, "prelu", 0.01, 0.5, 0),
        (X, WEIGHT, BIAS, None, words, "prelu", 0.01, 0.5, 0),
        (X, WEIGHT, BIAS, None, words[:1], "relu", 0.01, 0.5, 0),
        (X, WEIGHT, BIAS, None, words.int(), "relu", 0.01, 0.5, 0),
        (X, WEIGHT.double(), BIAS, None, words, "relu", 0.01, 0.5, 0),
        (X, WEIGHT, BIAS, None, words, "swish", 0.01, 0.5, 0),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError), match="linear_act_dropout"):
            op(*arguments)
