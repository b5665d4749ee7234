"""Tracing changes nothing: training is bit-identical, and no hook is left behind."""

import gc
import json
import random
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

import mlpkit
from mlpkit import _C, _events
from mlpkit.errors import ArgumentError
from mlpkit.trace import Tracer, _observer
from mlpkit.trace._records import OpRecord


def mlp(norm=None):
    return mlpkit.nn.MLP(8, [16, 16], 3, dropout=0.3, norm=norm)


def plain(model, step):
    return F.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 3, (16,)))


def under_autocast(model, step):
    with torch.autocast("cpu", torch.bfloat16):
        return plain(model, step).float()


def checkpointed(model, step):
    x = torch.randn(16, 8, requires_grad=True)
    return checkpoint(model, x, use_reentrant=False).pow(2).mean()


def failing(model, step):
    """Loss goes to NaN in the middle: tracing must not help, either."""
    return plain(model, step) * (torch.log(torch.zeros(())) if step == 12 else 1)


def images(model, step):
    return model(torch.randn(4, 2, 6, 6)).pow(2).mean()


def sequences(model, step):
    return model(torch.randn(3, 5, 8)).pow(2).mean()


def doubles(model, step):
    return F.mse_loss(model(torch.randn(16, 8, dtype=torch.float64)), torch.zeros(16, 3, dtype=torch.float64))


def halves(model, step):
    return model(torch.randn(16, 8).bfloat16()).float().pow(2).mean()


PROGRAMS = {
    "sgd": (mlp, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), plain),
    "adam foreach": (mlp, lambda p: torch.optim.Adam(p, foreach=True), plain),
    "adamw fused, batch norm": (lambda: mlp("batch"), lambda p: torch.optim.AdamW(p, fused=True), plain),
    "autocast": (lambda: mlp("layer"), torch.optim.Adam, under_autocast),
    "checkpoint": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.optim.Adagrad, checkpointed),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        lambda p: torch.optim.SGD(p, 0.01, nesterov=True, momentum=0.9),
        images,
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2), torch.optim.NAdam, sequences),
    "float64": (lambda: mlp().double(), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01), doubles),
    "bfloat16": (lambda: nn.Linear(8, 4).bfloat16(), lambda p: torch.optim.Adam(p, amsgrad=True), halves),
    "failing": (mlp, torch.optim.RMSprop, failing),
}


def run(name, tracer=None, steps=100):
    build, make_optimizer, loss_of = PROGRAMS[name]
    torch.manual_seed(3)
    model = build()
    optimizer = make_optimizer(model.parameters())
    seen = []

    def loop():
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            seen.append(loss.detach().clone())
            seen.extend(parameter.grad.clone() for parameter in model.parameters())
            optimizer.step()

    if tracer is None:
        loop()
    else:
        with tracer:
            loop()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return [*seen, *model.state_dict().values(), *state, torch.get_rng_state(), torch.rand(3)]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", PROGRAMS)
def test_losses_gradients_parameters_state_and_random_numbers_are_the_same_bits(name):
    without = run(name)
    tracer = Tracer()
    traced = run(name, tracer)
    assert len(without) == len(traced) > 300
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(without, traced, strict=True))
    assert tracer.steps == 100
    assert tracer.diagnosis.verdict == ("failure" if name == "failing" else "healthy")


def hooks():
    return (
        len(torch_module._global_forward_hooks),
        len(torch_module._global_forward_pre_hooks),
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
        torch.autograd._engine_run_backward,
        len(_events._listeners),
        torch.nn.Module.__call__,
        _C.followed(),
        torch.is_grad_enabled(),
    )


class Boom(Exception):
    pass


def boom(*_):
    raise Boom


def fail_in_forward(model):
    model[1].register_forward_hook(boom)
    model(torch.randn(2, 4))


def fail_in_backward(model):
    loss = model(torch.randn(2, 4)).sum()
    next(model.parameters()).register_hook(boom)
    loss.backward()


def fail_in_the_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_post_hook(boom)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()


def fail_in_an_operation(model):
    try:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    except RuntimeError as error:
        raise Boom from error


@pytest.mark.parametrize(
    "failing", [fail_in_forward, fail_in_backward, fail_in_the_optimizer, fail_in_an_operation, boom]
)
def test_no_hook_is_left_behind_after_an_exception(failing):
    before = hooks()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    tracer = Tracer()
    with pytest.raises(Boom), tracer:
        failing(model)
    assert hooks() == before
    assert tracer.diagnosis.verdict == "healthy"


def interrupted_after(events):
    """For ``sys.setprofile``: Ctrl-C at one of the calls and returns of Python."""
    left = [events]

    def count(frame, event, argument):
        left[0] -= 1
        if left[0] == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    return count


# An interrupt while Python frees a generator has nowhere to go.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("level", ["observe", "watch"])
def test_an_interrupt_at_any_of_50_points_leaves_no_hook_and_a_readable_report(level, tmp_path):
    before = hooks()
    generator = random.Random(11)
    stopped = 0
    for point in [generator.randrange(1, 6000) for _ in range(50)]:
        torch.manual_seed(0)
        model, tracer = mlp(), Tracer(level=level)
        optimizer = torch.optim.Adam(model.parameters())
        try:
            with tracer:
                sys.setprofile(interrupted_after(point))
                for step in range(12):
                    optimizer.zero_grad()
                    plain(model, step).backward()
                    optimizer.step()
                sys.setprofile(None)
        except KeyboardInterrupt:
            stopped += 1
        finally:
            sys.setprofile(None)
        assert hooks() == before
        written = json.loads(tracer.write_json(tmp_path / "diagnosis.json").read_text())
        assert written["verdict"] == "healthy"
        assert written["raised"] in (None, "KeyboardInterrupt")
    assert stopped > 25


def test_a_tracer_across_cells_starts_and_stops():
    before = hooks()
    tracer = Tracer().start()
    assert hooks() != before
    torch.log(torch.zeros(2)).sum().item()
    assert tracer.stop().op == "log"
    assert hooks() == before


def test_a_module_that_raised_and_was_caught_leaves_no_name_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with Tracer() as tracer:
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(2, 3))
        torch.log(torch.zeros(1, requires_grad=True)).backward()
    assert (tracer.diagnosis.op, tracer.diagnosis.module) == ("log", "")


def test_memory_stays_bounded_with_and_without_steps(monkeypatch):
    monkeypatch.setattr(_observer, "_MOST_RECORDS", 100)
    x = torch.ones(1)
    with Tracer() as tracer:
        for _ in range(400):
            x = torch.log(x - x).exp() + 1  # a benign -Inf each time
        gc.collect()
        assert sum(type(thing) is OpRecord for thing in gc.get_objects()) < 700
    assert tracer.operations == 1600
    assert [(found.op, found.evidence["repeats"]) for found in tracer.diagnoses] == [("log", 400)]


def test_tracers_nest():
    before = hooks()
    with Tracer() as outer:
        with Tracer() as inner:
            torch.log(torch.zeros(1, requires_grad=True)).backward()
        torch.ones(1)
    assert hooks() == before
    assert inner.diagnosis.op == "log"
    assert outer.diagnosis.op == "log"


def with_torch_func():
    weights = torch.func.vmap(torch.func.grad(lambda w, x: (w * x).sin().sum()), (None, 0))
    weights(torch.randn(3), torch.randn(5, 3))


def with_nested_tensors():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder(torch.randn(2, 3, 8), src_key_padding_mask=torch.tensor([[False, False, True], [False] * 3]))


def with_compile():
    torch.compile(nn.Linear(4, 4), backend="eager")(torch.randn(2, 4)).sum().backward()


def with_another_thread():
    model = nn.Sequential(nn.Linear(2, 2))
    inside = threading.Event()
    model[0].register_forward_hook(lambda *_: inside.set())
    thread = threading.Thread(target=lambda: model(torch.ones(1, 2)).sum().backward())
    thread.start()
    thread.join()
    assert inside.is_set()


def with_other_kinds_of_tensors():
    torch.fft.fft(torch.randn(4, dtype=torch.complex64, requires_grad=True)).abs().sum().backward()
    (torch.eye(3).to_sparse() @ torch.ones(3, 2)).sum()
    nn.Linear(3, 3, device="meta")(torch.ones(2, 3, device="meta"))


@pytest.mark.parametrize(
    "program", [with_torch_func, with_nested_tensors, with_compile, with_another_thread, with_other_kinds_of_tensors]
)
def test_what_the_tracer_does_not_follow_still_runs_without_a_word(program):
    before = hooks(), list(warnings.filters)
    with Tracer() as tracer:
        program()
        torch.log(torch.zeros(1, requires_grad=True)).backward()
    assert (hooks(), list(warnings.filters)) == before
    assert (tracer.diagnosis.op, tracer.diagnosis.module) == ("log", "")


def test_a_tracer_is_entered_once():
    tracer = Tracer()
    with tracer:
        pass
    with pytest.raises(ArgumentError, match="already entered"), tracer:
        pass


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ArgumentError, match="level is 'all', must be one of observe, watch"):
        Tracer(level="all")
    with pytest.raises(ArgumentError, match="model is a list"):
        Tracer([nn.Linear(1, 1)])
