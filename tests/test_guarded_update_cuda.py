"""The guarded update on a CUDA device: the CPU's numbers, no sync, graphs, and what guard.optim makes of it."""

import math

import pytest
import torch
from closeness import assert_within_ulps
from torch import nn

from mlpkit import guard
from mlpkit.ops.guarded_update import GroupSettings, Reason, ScaleRule, guarded_update

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("all_cuda_kernels")]
SETTINGS = [
    ("sgd", GroupSettings(momentum=0.9, nesterov=True, weight_decay=0.1)),
    ("adam", GroupSettings(weight_decay=0.1, amsgrad=True)),
    ("adamw", GroupSettings(weight_decay=0.1, l1=0.01)),
    ("rmsprop", GroupSettings(momentum=0.9)),
    ("lars", GroupSettings(momentum=0.9, weight_decay=0.1)),
    ("lamb", GroupSettings(weight_decay=0.1)),
]
SIZES = (700, 100_001, 1, 0, 33, 5_000_000)


def tensors(kind, settings, dtype, gradient, device):
    generator = torch.Generator().manual_seed(0)

    def draw(low, of):
        return [(torch.rand(size, generator=generator) * (1 - low) + low).to(of).to(device) for size in SIZES]

    adam = kind in ("adam", "adamw", "lamb")
    return {
        "params": draw(-1, dtype),
        "grads": draw(-1, gradient),
        "first": draw(-0.5, dtype) if adam or settings.momentum else [],
        "second": draw(0.5, dtype) if adam or kind == "rmsprop" else [],
        "third": draw(0.5, dtype) if settings.amsgrad else [],
        "steps": [torch.tensor(3.0, device=device) for _ in SIZES],
    }


@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=[kind for kind, _ in SETTINGS])
def test_updates_are_the_cpus(kind, settings, dtype, gradient):
    lists = [tensors(kind, settings, dtype, gradient, device) for device in ("cuda", "cpu")]
    before = [tensor.clone() for tensor in lists[1]["params"]]
    ours, theirs = (guarded_update(**one, kind=kind, settings=[settings], clip_norm=0.5) for one in lists)
    assert ours.outcome[[0, 1, 4, 5]].tolist() == theirs.outcome[[0, 1, 4, 5]].tolist()
    assert ours.outcome[2:4].tolist() == pytest.approx(theirs.outcome[2:4].tolist(), rel=1e-12)
    assert torch.equal(ours.census[:, :4].cpu(), theirs.census[:, :4])
    for a, b, c in zip(lists[0]["params"], lists[1]["params"], before, strict=True):
        if c.numel():
            assert_within_ulps(a.cpu(), b, c)
    assert [one.item() for one in lists[0]["steps"]] == [4.0] * len(SIZES)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing_and_moves_the_scale(value):
    one = tensors("adam", GroupSettings(), torch.float32, torch.float32, "cuda")
    one["grads"][1][99_999] = value
    before = [tensor.clone() for name in ("params", "first", "second", "steps") for tensor in one[name]]
    scale, clean = torch.tensor(64.0, device="cuda"), torch.tensor(5, dtype=torch.int32, device="cuda")
    said = guarded_update(
        **one, kind="adam", settings=[GroupSettings()], scale=scale, clean_steps=clean, rule=ScaleRule()
    )
    assert said.outcome[[0, 1, 4, 5]].tolist() == [0, Reason.GRADIENT, 1, 1]
    after = [tensor for name in ("params", "first", "second", "steps") for tensor in one[name]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert (scale.item(), clean.item()) == (32.0, 0)


def model_and_optimizer(make=guard.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).cuda()
    return model, make(model.parameters(), lr=1e-2, **options)


def test_steps_of_guard_optim_wait_for_nothing_and_tell_afterwards():
    model, optimizer = model_and_optimizer()
    x = torch.randn(8, 16, device="cuda")
    torch.cuda.synchronize()
    for i in range(4):
        optimizer.zero_grad()
        if i > 0:
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss = model(x).square().mean()
            (loss * (math.nan if i == 2 else 1.0)).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [record.step for record in optimizer.records] == [2]
    assert optimizer.records[0].kind == "NaN"
    assert optimizer.state[model[0].weight]["step"].item() == 3


def test_a_train_step_is_queued_and_skips_atomically():
    model, optimizer = model_and_optimizer()
    step = guard.TrainStep(model, "mse", optimizer, clip_norm=1.0)
    x, y = torch.randn(8, 16, device="cuda"), torch.randn(8, 4, device="cuda")
    results = [step(x, y)]
    before = [tensor.clone() for tensor in model.state_dict().values()]
    results.append(step(torch.where(x > 1, math.inf, x), y))
    assert step.path == "queued"
    assert step.syncs == 0
    assert [result.skipped for result in results] == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before))


def test_a_captured_step_replays():
    model, optimizer = model_and_optimizer(guard.optim.SGD, momentum=0.9)
    twin, plain = model_and_optimizer(torch.optim.SGD, momentum=0.9)
    x = torch.randn(8, 16, device="cuda")

    def run(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(model, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
        optimizer.step()
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        run(twin, plain)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def without_syncs(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_train_step_in_fp16_waits_for_nothing():
    model, optimizer = model_and_optimizer()
    step = guard.TrainStep(model, "mse", optimizer, precision="fp16", clip_norm=1.0)
    x, y = torch.randn(8, 16, device="cuda"), torch.randn(8, 4, device="cuda")
    bad = torch.where(x > 1, math.inf, x)
    results = [step(x, y), *(without_syncs(lambda batch=batch: step(batch, y)) for batch in (x, bad, x))]
    assert step.path == "queued"
    assert [result.skipped for result in results] == [False, False, True, False]
    assert step.scale == 65536.0  # no scale could have helped
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_scalers_steps_wait_for_nothing():
    model, optimizer = model_and_optimizer()
    scaler = guard.GradScaler("cuda", init_scale=1024.0, model=model)
    x = torch.randn(8, 16, device="cuda")
    huge = torch.full((), 1e38, device="cuda")

    def take(i):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if i == 2:
            loss.register_hook(lambda gradient: gradient * huge)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    take(0)
    for i in range(1, 4):
        without_syncs(lambda i=i: take(i))
    assert [record.step for record in scaler.records] == [2]
    assert scaler.get_scale() == 512.0
    assert optimizer.state[model[0].weight]["step"].item() == 3
