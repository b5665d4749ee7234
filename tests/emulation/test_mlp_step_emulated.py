"""The CUDA kernels of a small network's step, run thread by thread on the CPU: values, gradients, masks, decisions."""

import itertools

import closeness
import pytest
import torch
from emulator import find_compiler
from mlp_emulator import LOSSES, MlpStep, Task
from torch.nn import functional as F

from mlpkit.reference import activate, dropout_mask

ADAM = [1e-2, 0.0, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no host compiler to build the emulator with")
    return MlpStep(compiler, tmp_path_factory.mktemp("mlp_step"))


@pytest.fixture(autouse=True)
def _usual_device(emulator):
    emulator.multiprocessors, emulator.shared_bytes = 2, 227 * 1024


def make(widths, rows, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    weights = [draw(o, i) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases = [0.1 * draw(o) for o in widths[1:]]
    if options.get("loss", "cross_entropy") == "cross_entropy":
        target = torch.randint(0, widths[-1], (rows,), generator=generator)
    else:
        target = torch.rand(rows, widths[-1], generator=generator) + 0.1
    if options.get("loss") == "log_mse":
        weights[-1], biases[-1] = 0.2 * weights[-1], biases[-1] + 3.0
    return Task(weights, biases, draw(rows, widths[0]), target, **options)


def masks_of(task):
    """Factors of every hidden layer's outputs: 0 where dropped, the scale elsewhere."""
    rows, (seed, offset) = task.x.shape[0], task.seed.tolist()
    factors = []
    for stream, width in enumerate(task.widths[1:-1]):
        kept, scale = dropout_mask(rows, width, task.p, seed, offset, stream)
        factors.append(kept.double() * scale)
    return factors


def in_torch(task, dtype):
    """Outputs, loss and gradients by torch: autocast over float32 parameters, or float64 throughout."""
    exact = dtype == torch.float64
    to = (lambda t: None if t is None else t.double()) if exact else (lambda t: t)
    parameters = [to(one).clone().requires_grad_() for one in task.parameters()]
    rest, h, factors = iter(parameters), to(task.x), masks_of(task)
    with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        for i, bias in enumerate(task.biases):
            h = F.linear(h, next(rest), next(rest) if bias is not None else None)
            if i + 1 < len(task.weights):
                h = activate(h, task.activation, 0.01)
                h = h * factors[i].to(h.dtype) if task.p else h
        y = h
    loss = loss_of(task, y if exact else y.float())
    scale = 1.0 if task.loss_scale is None else task.loss_scale.item()
    (loss * scale).backward()
    return y.detach(), loss.detach(), [one.grad / scale for one in parameters]


def loss_of(task, y):
    reduction = {"reduction": "mean" if task.mean else "sum"}
    target = task.target if task.loss == "cross_entropy" else task.target.to(y.dtype)
    if task.loss == "cross_entropy":
        weight = None if task.class_weights is None else task.class_weights.to(y.dtype)
        options = {"label_smoothing": task.label_smoothing, "ignore_index": task.ignore_index}
        return F.cross_entropy(y, target, weight, **options, **reduction)
    if task.loss == "huber":
        return F.huber_loss(y, target, delta=task.delta, **reduction)
    if task.loss == "log_mse":
        return F.mse_loss(y.log(), target.log(), **reduction)
    kinds = {"bce": F.binary_cross_entropy_with_logits, "mse": F.mse_loss, "l1": F.l1_loss}
    return kinds[task.loss](y, target, **reduction)


def fresh(task):
    return [(torch.zeros_like(one), torch.zeros_like(one), torch.tensor(0.0)) for one in task.parameters()]


def step(emulator, task, dtype, states=None, optimizer="adam", group=ADAM, **options):
    """One whole step; outputs, gradients, and what the device says of it."""
    y, parts, values = emulator.run_pass(task, dtype)
    states = fresh(task) if states is None else states
    if task.loss_scale is not None:
        options.setdefault("clean_steps", torch.tensor(0, dtype=torch.int32))
    gradients, found = emulator.update(task, parts, values, states, optimizer, group, **options)
    return y, gradients, found


def check(emulator, dtype, widths, rows, make=make, **options):
    """Outputs and gradients over nine seeds by the rule of docs/precision.md."""
    results = []
    for seed in closeness.SEEDS:
        task = make(widths, rows, seed, **options)
        stock, exact = in_torch(task, dtype), in_torch(task, torch.float64)
        y, gradients, found = step(emulator, task, dtype)
        assert found["taken"] == 1
        results.append(((y, gradients), stock, exact))
    ours, stock, exact = zip(*results)
    compare = closeness.assert_no_worse_than
    compare([a[0] for a in ours], [a[0] for a in stock], [a[0] for a in exact], "outputs")
    for i in range(len(ours[0][1])):
        compare([a[1][i] for a in ours], [a[2][i] for a in stock], [a[2][i] for a in exact], f"gradient {i}")


def make_representable(*args, **options):
    """A task whose inputs and weights are bfloat16's."""
    task = make(*args, **options)
    for one in (task.x, *task.weights):
        one.copy_(one.bfloat16())
    return task


def check_loss(emulator, widths, rows, **options):
    """The loss and its gradients where inputs and weights need no rounding: the loss is held against float32's."""
    ours, stock, exact = [], [], []
    for seed in closeness.SEEDS:
        task = make_representable(widths, rows, seed, **options)
        stock.append(in_torch(task, torch.float32)[1])
        exact.append(in_torch(task, torch.float64)[1])
        ours.append(torch.tensor(step(emulator, task, torch.bfloat16)[2]["loss"]).float())
    closeness.assert_no_worse_than(ours, stock, exact, "loss")
    check(emulator, torch.bfloat16, widths, rows, make_representable, **options)


NETWORKS = {
    "mixed widths": ([20, 33, 17, 10], 70, {"p": 0.3}),
    "one layer": ([9, 4], 21, {}),
    "four of 64": ([64, 64, 64, 64, 64, 16], 40, {"loss": "mse"}),
    "eight hidden": ([5, 16, 48, 32, 80, 24, 16, 40, 16, 3], 33, {"activation": "gelu", "p": 0.1, "loss": "huber"}),
    "256 wide": ([7, 256, 3], 19, {"activation": "silu", "p": 0.2, "loss": "bce"}),
    "wide input": ([130, 100, 1], 37, {"activation": "tanh", "loss": "mse"}),
    "128 wide": ([100, 128, 4], 50, {"activation": "leaky_relu", "p": 0.5}),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_and_gradients_err_no_more_than_autocast(emulator, network):
    widths, rows, options = NETWORKS[network]
    check(emulator, torch.bfloat16, widths, rows, **options)


@pytest.mark.parametrize("network", ["mixed widths", "256 wide"])
def test_float16_under_a_loss_scale_errs_no_more_than_autocast(emulator, network):
    widths, rows, options = NETWORKS[network]
    check(emulator, torch.float16, widths, rows, loss_scale=torch.tensor(1024.0), **options)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_errs_no_more_than_torch(emulator, loss, mean):
    check_loss(emulator, [6, 21], 35, loss=loss, mean=mean)


def test_smoothed_weighted_classes_with_ignored_rows_err_no_more_than_torch(emulator):
    weights = torch.rand(11, generator=torch.Generator().manual_seed(5)) + 0.2
    check_loss(emulator, [6, 11], 35, label_smoothing=0.1, class_weights=weights, ignore_index=3)


def exact_network(width, rows, layers):
    """Small integers and p = 1/2: no rounding anywhere, so outputs are products of masks, bit for bit."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(1, 8, (rows, width), generator=generator).float()
    return Task([torch.eye(width)] * layers, [None] * layers, x, p=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "rows"), [(16, 16), (40, 75), (130, 33)])
def test_masks_are_the_mask_contract(emulator, width, rows, dtype):
    task = exact_network(width, rows, 3)
    y, _, _ = emulator.run_pass(task, dtype, gradients=False, loss=False)
    expected = task.x.double()
    for factor in masks_of(task):
        expected = expected * factor
    assert torch.equal(y.double(), expected)


def test_dropping_everything_leaves_the_last_bias(emulator):
    task = make([8, 24, 5], 18, p=1.0)
    y, _, _ = emulator.run_pass(task, torch.bfloat16, gradients=False, loss=False)
    assert torch.equal(y, task.biases[-1].bfloat16().expand(18, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_half_precision_give_what_their_float32_gives(emulator, dtype):
    task = make([24, 32, 8], 40)
    task.x = task.x.to(dtype)
    narrow, _, _ = emulator.run_pass(task, dtype, gradients=False, loss=False)
    task.x = task.x.float()
    single, _, _ = emulator.run_pass(task, dtype, gradients=False, loss=False)
    assert torch.equal(narrow, single)


def test_memory_off_16_byte_boundaries_gives_the_same(emulator):
    task = make([24, 32, 8], 40)
    aligned = emulator.run_pass(task, torch.bfloat16)
    for tensors in (task.weights, task.biases):
        tensors[:] = [torch.cat([torch.zeros(1), one.flatten()])[1:].view_as(one) for one in tensors]
    task.x = torch.cat([torch.zeros(1), task.x.flatten()])[1:].view_as(task.x)
    for ours, theirs in zip(emulator.run_pass(task, torch.bfloat16), aligned):
        assert torch.equal(ours, theirs)


def test_every_schedule_of_threads_gives_the_same_bits(emulator):
    task = make([20, 33, 17, 10], 150, p=0.3, activation="silu")
    runs = [emulator.run_pass(task, torch.bfloat16) for _ in range(4)]
    for other in runs[1:]:
        for ours, theirs in zip(other, runs[0]):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("shared_bytes", "panels"), [(48 * 1024, 4), (36 * 1024, 1)])
def test_streamed_weights_give_the_bits_of_resident_ones(emulator, shared_bytes, panels):
    task = make([60, 100, 40, 10], 90, p=0.3, activation="gelu")
    emulator.multiprocessors = 3
    resident = emulator.run_pass(task, torch.bfloat16)
    assert emulator.plan(task)["resident"] == 1
    emulator.shared_bytes = shared_bytes
    plan = emulator.plan(task)
    assert plan["resident"] == 0
    assert plan["panels"] == panels
    assert plan["shared_bytes"] <= shared_bytes
    for ours, theirs in zip(emulator.run_pass(task, torch.bfloat16), resident):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shared_bytes", [227 * 1024, 40 * 1024])
def test_many_blocks_of_rows_add_up_to_the_whole(emulator, shared_bytes):
    task = make([20, 48, 33, 10], 3 * 256 + 5)
    emulator.multiprocessors = 64
    _, together, _ = step(emulator, make([20, 48, 33, 10], 3 * 256 + 5), torch.bfloat16)
    emulator.multiprocessors, emulator.shared_bytes = 2, shared_bytes
    plan = emulator.plan(task)
    assert plan["row_blocks"] > plan["blocks"], "no block would have to add up"
    assert plan["shared_sums"] == (shared_bytes > 100 * 1024)
    _, gradients, _ = step(emulator, task, torch.bfloat16)
    for ours, theirs in zip(gradients, together):
        # The same products in another order: a sum of 773 terms differs by its rounding alone.
        assert (ours - theirs).abs().max() <= 773 * torch.finfo(torch.float32).eps * theirs.abs().max()


def test_sums_over_many_rows_of_one_sign_err_no_more_than_torch(emulator):
    def one_sign(*args, **options):
        task = make(*args, **options)
        task.x.abs_()
        task.target.fill_(-40.0)
        return task

    emulator.multiprocessors = 1
    check(emulator, torch.bfloat16, [3, 2], 4000, one_sign, loss="mse", mean=False)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}, [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    "sgd with nesterov's momentum": (
        torch.optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        [0.1, 0.01, 0.9, 0.0, 0.0, 0.0, 0.0, 1.0],
    ),
    "adam": (torch.optim.Adam, {"weight_decay": 0.01}, [0.1, 0.01, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0]),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}, [0.1, 0.1, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0]),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.95}, [0.1, 0.0, 0.0, 0.0, 0.0, 0.95, 1e-8, 0.0]),
}
FIRST = {"sgd": ("momentum_buffer", None), "adam": ("exp_avg", "exp_avg_sq"), "rmsprop": (None, "square_avg")}


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_err_no_more_than_torch(emulator, name, clip):
    make_optimizer, options, group = OPTIMIZERS[name]
    kind = name.split()[0]
    first, second = FIRST["adam" if kind == "adamw" else kind]
    ours, stock, exact = [], [], []
    for seed in closeness.SEEDS:
        task = make([20, 33, 10], 20, seed)
        start = [one.clone() for one in task.parameters()]
        generator = torch.Generator().manual_seed(seed)
        gathered = [torch.randn(one.shape, generator=generator) for one in start]
        squared = [torch.rand(one.shape, generator=generator) for one in start]
        heavy = kind != "sgd" or "momentum" in options
        states = [
            (a.clone() if first and heavy else None, b.clone() if second else None, torch.tensor(4.0))
            for a, b in zip(gathered, squared)
        ]
        _, gradients, found = step(emulator, task, torch.bfloat16, states, kind, group, clip_norm=clip)
        assert found["taken"] == 1
        assert all(state[2] == 5.0 for state in states)
        ours.append(torch.cat([one.flatten() for one in task.parameters()]))
        for dtype, to in ((torch.float32, stock), (torch.float64, exact)):
            parameters = [one.to(dtype).clone().requires_grad_() for one in start]
            optimizer = make_optimizer(parameters, lr=group[0], foreach=False, **options)
            for one, gradient, a, b in zip(parameters, gradients, gathered, squared):
                one.grad = gradient.to(dtype)
                held = {first: a.to(dtype, copy=True), second: b.to(dtype, copy=True), "step": torch.tensor(4.0)}
                optimizer.state[one] = {key: value for key, value in held.items() if key}
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            to.append(torch.cat([one.detach().flatten() for one in parameters]))
    closeness.assert_no_worse_than(ours, stock, exact, name)


def skipped(emulator, task, dtype, **options):
    """What the device says of a step that must change nothing."""
    states = fresh(task)
    before = [one.clone() for one in (*task.parameters(), *(one for state in states for one in state))]
    offset = task.seed[1].item()
    _, _, found = step(emulator, task, dtype, states, **options)
    after = [*task.parameters(), *(one for state in states for one in state)]
    assert found["taken"] == 0
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    assert task.seed[1] == offset + 1, "a skipped step has used its random numbers up"
    return found


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bad_input_changes_nothing(emulator, value):
    task = make([20, 33, 10], 40, p=0.1)
    task.x[7, 3] = value
    found = skipped(emulator, task, torch.bfloat16)
    assert found["overflowed"] == 0


def test_a_class_out_of_range_changes_nothing(emulator):
    task = make([20, 33, 10], 40)
    task.target[11] = 10
    skipped(emulator, task, torch.bfloat16)


def test_a_batch_of_ignored_rows_changes_nothing(emulator):
    task = make([20, 33, 10], 40, ignore_index=0)
    task.target.zero_()
    skipped(emulator, task, torch.bfloat16)


def test_state_that_an_update_could_overflow_changes_nothing(emulator):
    task = make([20, 33, 10], 40)
    task.weights[1][3, 2] = 2.0**41
    task.activation = "tanh"
    states = fresh(task)
    before = [one.clone() for one in task.parameters()]
    _, _, found = step(emulator, task, torch.bfloat16, states)
    assert found["taken"] == 0
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), before))


def test_an_overflow_halves_the_scale_and_clean_steps_double_it(emulator):
    task = make([20, 33, 10], 40, loss_scale=torch.tensor(2.0**24), mean=False)
    clean = torch.tensor(2, dtype=torch.int32)
    found = skipped(emulator, task, torch.float16, clean_steps=clean)
    assert found["overflowed"] == 1
    assert task.loss_scale == 2.0**23
    assert clean == 0
    task.loss_scale.fill_(8.0)
    states = fresh(task)
    for scale, count in ((8.0, 1), (8.0, 2), (16.0, 0)):
        _, _, found = step(emulator, task, torch.float16, states, clean_steps=clean)
        assert found["taken"] == 1
        assert task.loss_scale == scale
        assert clean == count


def test_a_bad_loss_leaves_the_scale(emulator):
    task = make([20, 33, 10], 40, loss_scale=torch.tensor(8.0))
    task.x[0, 0] = float("nan")
    clean = torch.tensor(2, dtype=torch.int32)
    skipped(emulator, task, torch.float16, clean_steps=clean)
    assert task.loss_scale == 8.0
    assert clean == 2


def test_masks_move_on_from_step_to_step(emulator):
    task = exact_network(16, 32, 2)
    task.target = torch.zeros(32, dtype=torch.int64)
    first, _, _ = step(emulator, task, torch.bfloat16, group=[0.0, *ADAM[1:]])
    second, _, _ = step(emulator, task, torch.bfloat16, group=[0.0, *ADAM[1:]])
    assert task.seed[1] == 9
    for y, offset in ((first, 7), (second, 8)):
        task.seed[1] = offset
        assert torch.equal(y.double(), task.x.double() * masks_of(task)[0])


def test_plans_for_an_h200_keep_every_multiprocessor_busy_and_fit(emulator):
    emulator.multiprocessors = 132
    plans = {}
    for rows in (1, 4096, 2**21):
        for widths in ([128, 64, 64, 10], [64, 64, 64, 64, 64, 16], [256] * 10, [1, 1]):
            for activation in ("relu", "gelu"):
                weights = [torch.empty(o, i) for i, o in itertools.pairwise(widths)]
                task = Task(weights, [None] * len(weights), torch.empty(1, widths[0]).expand(rows, -1))
                task.activation = activation
                plan = emulator.plan(task)
                assert plan is not None
                assert plan["shared_bytes"] <= 227 * 1024
                assert plan["blocks"] >= min(128, rows // 32)
                plans[rows, widths[1], len(widths), activation] = plan
    assert plans[4096, 64, 4, "relu"]["row_blocks"] == 128
    assert plans[2**21, 64, 6, "relu"]["resident"]
    assert plans[2**21, 64, 6, "relu"]["shared_sums"]
    assert not plans[4096, 256, 10, "gelu"]["resident"]


def test_a_network_that_does_not_fit_has_no_plan(emulator):
    task = make([16, 257, 4], 8)
    assert emulator.plan(task) is None
    emulator.shared_bytes = 16 * 1024
    assert emulator.plan(make([256, 256, 256], 8)) is None
