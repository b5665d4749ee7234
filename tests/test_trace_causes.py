"""The textbook failures: op, phase, step, module, cause, node and line of each, as established by running it."""

import pytest
import test_trace_programs as programs
import torch
from test_trace_programs import LINES, Nested, Net
from torch import nn

from mlpkit.trace import Tracer

# case: op, phase, step, module, cause, dtype, node
CASES = {
    programs.fp16_overflow_into_layernorm: ("addmm", "forward", 1, "fc1", "overflow", "float16", None),
    programs.log_of_zero: ("log", "forward", 0, "", "log_of_zero", "float32", None),
    programs.zero_over_zero: ("div", "forward", 0, "", "zero_over_zero", "float32", None),
    programs.learning_rate_too_high: ("addmm", "forward", 3, "2", "hyperparameter", "float32", None),
    programs.sqrt_of_zero_in_backward: ("div", "backward", 0, "", "division_by_zero", "float32", "SqrtBackward0"),
    programs.softmax_by_hand: ("exp", "forward", 0, "", "overflow", "float32", None),
    programs.nan_in_the_input: ("input", "source", 0, "", "external", "float32", None),
    programs.nan_in_a_parameter: ("param", "source", 0, "1", "external", "float32", None),
    programs.input_cast_overflows: ("_to_copy", "source", 0, "", "cast_overflow", "float16", None),
    programs.parameter_cast_overflows: ("_to_copy", "source", 0, "", "cast_overflow", "float16", None),
    programs.autocast_overflows: ("_to_copy", "forward", 0, "fc1", "cast_overflow", "float16", None),
    programs.eps_underflows_in_fp16: ("add", "forward", 0, "", "underflow", "float16", None),
    programs.log_of_an_underflowed_softmax: ("_softmax", "forward", 0, "", "underflow", "float32", None),
    programs.infinite_learning_rate: ("add_", "optimizer", 0, "", "hyperparameter", "float32", None),
    programs.nan_learning_rate_foreach: ("_foreach_add_", "optimizer", 1, "", "hyperparameter", "float32", None),
    programs.huge_learning_rate_overflows_the_update: ("add_", "optimizer", 0, "", "hyperparameter", "float32", None),
    programs.adam_without_eps_on_a_zero_gradient: ("addcdiv_", "optimizer", 0, "", "zero_over_zero", "float32", None),
    programs.squared_gradient_overflows: (
        "_fused_adam_",
        "optimizer",
        0,
        "",
        "overflow",
        "float32",
        None,
    ),
    programs.hand_written_update: ("mul", "optimizer", 1, "", "hyperparameter", "float32", None),
    programs.fully_masked_row: ("_softmax", "forward", 0, "", "inf_minus_inf", "float32", None),
    programs.sqrt_of_a_negative: ("sqrt", "forward", 0, "", "sqrt_of_negative", "float32", None),
    programs.mean_of_nothing: ("mean", "forward", 0, "", "empty_reduction", "float32", None),
    programs.every_target_ignored: ("nll_loss_forward", "forward", 0, "", "empty_reduction", "float32", None),
    programs.acos_outside_its_domain: ("acos", "forward", 0, "", "domain", "float32", None),
    programs.activations_explode_over_layers: ("mm", "forward", 0, "10", "explosion", "float32", None),
    programs.fused_layer_overflows_in_fp16: ("linear_act_dropout", "forward", 0, "0", "overflow", "float16", None),
    programs.a_model_without_training_returns_nan: ("addmm", "forward", 0, "0", "overflow", "float32", None),
    programs.a_value_that_is_only_printed: ("log", "forward", 0, "", "log_of_zero", "float32", None),
    programs.negative_running_variance: ("native_batch_norm", "forward", 0, "0", "sqrt_of_negative", "float32", None),
    programs.layernorm_without_eps: ("native_layer_norm", "forward", 0, "0", "zero_over_zero", "float32", None),
    programs.one_update_blows_up: ("pow", "forward", 1, "", "hyperparameter", "float32", None),
    programs.one_bad_batch: ("pow", "forward", 20, "", "overflow", "float32", None),
    programs.attention_scores_overflow_in_fp16: ("bmm", "forward", 0, "", "overflow", "float16", None),
    programs.mask_times_infinity: ("log", "forward", 0, "", "log_of_zero", "float32", None),
    programs.soft_target_of_a_masked_class: ("mul", "forward", 0, "", "zero_times_inf", "float32", None),
    programs.where_does_not_stop_the_gradient: ("div", "backward", 0, "", "zero_over_zero", "float32", "SqrtBackward0"),
    programs.gradients_explode_over_time: ("mm", "backward", 0, "", "explosion", "float32", "MmBackward0"),
    programs.adam_eps_underflows_in_fp16: ("add_", "optimizer", 0, "", "underflow", "float16", None),
    programs.own_autograd_function: ("div", "backward", 0, "0", "division_by_zero", "float32", "DivideBackward"),
    programs.batchnorm_statistics: ("native_batch_norm", "forward", 0, "0", "overflow", "float32", None),
}
MARKS = {
    programs.fp16_overflow_into_layernorm: "fc1",
    programs.autocast_overflows: "fc1",
    programs.infinite_learning_rate: "update",
    programs.nan_learning_rate_foreach: "update",
    programs.adam_without_eps_on_a_zero_gradient: "update",
}


def trace(program, model=None):
    with Tracer(model) as tracer:
        program()
    return tracer


@pytest.mark.parametrize("program", CASES, ids=lambda program: program.__name__)
def test_the_root_is_named_exactly(program):
    found = trace(program).diagnosis
    expected = CASES[program]
    assert found.verdict == "failure", found.sentence
    answer = (found.op, found.phase, found.step, found.module, found.cause, found.dtype, found.node)
    assert answer == expected, found.sentence
    mark = MARKS.get(program, program.__name__)
    if mark in LINES:
        assert found.location.endswith(f"test_trace_programs.py:{LINES[mark]}")


def stages(found):
    return [(link["stage"], link["op"]) for link in found.chain]


def test_an_overflow_turns_to_nan_in_the_norm_and_stays_in_the_parameters():
    found = trace(programs.fp16_overflow_into_layernorm).diagnosis
    assert stages(found) == [
        ("saturation", "addmm"),
        ("invalidation", "native_layer_norm"),
        ("contamination", "addmm"),
        ("contamination", "_to_copy"),
        ("persistence", "add_"),
    ]
    assert found.chain[1]["cause"] == "inf_minus_inf"
    assert found.chain[1]["module"] == "norm"
    assert found.chain[-1]["detail"] == "parameter `fc1.weight` and 5 more written"
    assert found.sentence.startswith("Step 1, forward of `fc1` (")
    assert found.sentence.endswith("addmm in float16 gave Inf; exact result 1.15e5 > 65504 (overflow).")
    # 64 products of 60 and 30, and a small bias.
    assert found.evidence["exact"] == pytest.approx(64 * 60 * 30, rel=1e-3)
    assert found.evidence["limit"] == 65504.0
    assert [step for step, _ in found.evidence["absmax_history"]] == [0]
    assert found.evidence["operands"]["left"] == 60.0
    assert [fix["verified"] for fix in found.fix] == [None] * len(found.fix)
    assert found.fix[0]["kind"] == "upcast"


def test_a_learning_rate_too_high_is_an_explosion_that_ends_in_an_overflow():
    found = trace(programs.learning_rate_too_high).diagnosis
    first, second = found.chain[:2]
    assert (first["stage"], first["phase"], first["cause"]) == ("explosion", "optimizer", "hyperparameter")
    assert first["step"] < second["step"] == 3
    assert (second["stage"], second["cause"]) == ("saturation", "overflow")
    assert found.fix[0]["kind"] == "lower_lr"


def test_zero_times_inf_in_backward_is_the_second_link():
    found = trace(programs.sqrt_of_zero_in_backward).diagnosis
    assert stages(found)[:2] == [("saturation", "div"), ("invalidation", "mul")]
    assert found.chain[1]["cause"] == "zero_times_inf"
    assert found.chain[-1]["stage"] == "persistence"


def test_an_underflow_names_the_rounded_operation_first_and_then_the_division():
    found = trace(programs.eps_underflows_in_fp16).diagnosis
    assert stages(found) == [("saturation", "add"), ("invalidation", "div")]
    assert found.evidence["exact"] == pytest.approx(1e-8)
    assert "exact result 1e-8 was rounded to 0 (underflow), then div gave NaN: 0 / 0" in found.sentence


def test_a_bad_parameter_is_named():
    found = trace(programs.nan_in_a_parameter).diagnosis
    assert "param `1.weight` held 1 NaN and 0 Inf of 8 elements (external)." in found.sentence
    assert found.evidence["index"] == [3]


def test_a_given_model_names_its_modules_below_a_wrapper():
    inner = Net().half()
    with torch.no_grad():
        inner.fc1.weight.fill_(3000.0)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = inner

        def forward(self, x):
            return self.body(x)

    wrapper = Wrapper()
    run = lambda: wrapper(torch.ones(1, 64).half()).sum().backward()  # noqa: E731
    assert trace(run).diagnosis.module == "body.fc1"
    assert trace(run, model=wrapper).diagnosis.module == "body.fc1"


def test_a_backward_operation_is_mapped_to_the_forward_line_and_module():
    w = torch.zeros(2, requires_grad=True)

    def program():
        loss = Nested()(w).sum()
        loss.backward()

    found = trace(program).diagnosis
    assert (found.phase, found.module, found.node) == ("backward", "inner.0", "SqrtBackward0")
    assert found.location.endswith(f":{LINES['root_forward']}")


def test_the_first_failure_is_the_diagnosis_and_all_are_listed():
    def program():
        w = torch.ones(2, requires_grad=True)
        torch.log(w * 0).sum().backward()
        w = torch.ones(2, requires_grad=True)
        torch.sqrt(w - 2).sum().backward()

    found = trace(program)
    assert found.diagnosis.op == "log"
    assert [(one.op, one.verdict) for one in found.diagnoses if one.phase == "forward"] == [
        ("log", "failure"),
        ("sqrt", "failure"),
    ]


def test_a_small_parameter_that_grows_below_what_others_began_with_is_no_explosion():
    small, large = (torch.tensor([start], requires_grad=True) for start in (1e-6, 10.0))
    optimizer = torch.optim.SGD([small, large], lr=1e-3)
    with Tracer() as tracer:
        for step in range(2):
            optimizer.zero_grad()
            (small + torch.exp(large * (100.0 if step else 1e-3))).sum().backward()
            optimizer.step()
    found = tracer.diagnosis
    assert (found.step, found.op, found.cause) == (1, "exp", "overflow")


def test_a_write_to_a_part_leaves_the_rest_bad():
    w = torch.ones(2, requires_grad=True)
    with Tracer() as tracer:
        y = torch.log(w - 2).clone()
        y[0] = 1.0
        y.sum().backward()
    assert (tracer.diagnosis.op, tracer.diagnosis.cause) == ("log", "domain")


def test_the_chain_names_the_first_modules_that_passed_a_value_on_and_no_more():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    with Tracer(model) as tracer:
        model(torch.log(torch.zeros(1, 2))).sum().backward()
    passed = [link["module"] for link in tracer.diagnosis.chain if link["stage"] == "contamination"]
    assert 0 < len(passed) <= 4
