"""mlpkit inside other people's loops and files: each test runs against the real thing, where it is installed."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mlpkit.errors import ArgumentError, MissingExtraError
from mlpkit.guard import GradScaler
from mlpkit.interop.onnx import stock
from mlpkit.nn import MLP, FusedLinear

BAD = 3  # the batch that holds a number float16 cannot


def batches(steps=6):
    """Rows and classes for a few steps; one row of one batch is far too large for float16."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, 16, 8, generator=generator)
    y = torch.randint(3, (steps, 16), generator=generator)
    x[BAD, 0, 0] = 1e6
    return x, y


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# Lightning


@pytest.fixture
def lightning(monkeypatch, tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)
    return pl


def fitted(pl, callback, *, through_forward, plugins=(), steps=6, **settings):
    """A run of Lightning over ``batches``: the module, and its state at the end of each step."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.cross_entropy(self(x) if through_forward else self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    class States(pl.Callback):
        def __init__(self):
            self.states = []

        def on_train_batch_end(self, trainer, module, *_):
            self.states.append(state_of(module))

    x, y = batches(steps)
    loader = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=None)
    states, module = States(), Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, plugins=list(plugins), callbacks=[callback, states], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module, states.states


QUIET = [
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
]


def quiet(test):
    """Without the warnings that the libraries raise about themselves."""
    for line in QUIET:
        test = pytest.mark.filterwarnings(line)(test)
    return test


@quiet
@pytest.mark.parametrize("through_forward", [True, False], ids=["forward", "parts"])
def test_lightning_in_fp16_skips_the_bad_batch_whole_and_says_why(lightning, through_forward):
    from lightning.pytorch.plugins import MixedPrecision

    from mlpkit.interop.lightning import MlpkitCallback

    callback = MlpkitCallback()
    plugin = MixedPrecision("16-mixed", device="cpu")
    _, states = fitted(lightning, callback, through_forward=through_forward, plugins=[plugin])
    assert isinstance(plugin.scaler, GradScaler)
    (record,) = callback.records
    assert record.step == BAD
    assert all(torch.equal(states[BAD - 1][name], value) for name, value in states[BAD].items())
    assert not torch.equal(states[BAD]["net.0.weight"], states[BAD + 1]["net.0.weight"])
    assert not torch.equal(states[BAD]["net.1.running_mean"], states[BAD + 1]["net.1.running_mean"])
    found = callback.diagnosis
    assert (found.verdict, found.step, found.cause) == ("failure", BAD, "cast_overflow")
    assert "Step skipped" in found.sentence


@quiet
@pytest.mark.filterwarnings("ignore:Mixed Precision with")
def test_lightning_alone_is_ruined_by_the_same_batch(lightning):
    from lightning.pytorch.plugins import MixedPrecision

    _, states = fitted(
        lightning, lightning.Callback(), through_forward=True, plugins=[MixedPrecision("16-mixed", device="cpu")]
    )
    assert not states[-1]["net.1.running_mean"].isfinite().all()


@quiet
def test_lightning_in_float32_is_traced_and_warned_that_nothing_is_guarded(lightning, tmp_path):
    from mlpkit.interop.lightning import MlpkitCallback

    callback = MlpkitCallback(trace="watch", out=tmp_path / "traced")
    with pytest.warns(UserWarning, match="guards nothing: precision is '32-true', and only \"16-mixed\" has a scaler"):
        traced, _ = fitted(lightning, callback, through_forward=True)
    assert callback.records == []
    assert callback.tracer.steps == 6
    assert callback.diagnosis.verdict == "healthy"
    assert (tmp_path / "traced" / "diagnosis.json").exists()
    plain, _ = fitted(lightning, lightning.Callback(), through_forward=True)
    assert all(torch.equal(a, b) for a, b in zip(traced.state_dict().values(), plain.state_dict().values()))


@quiet
def test_lightning_steps_are_optimizer_steps_and_an_exception_ends_the_trace(lightning):
    from mlpkit.interop.lightning import MlpkitCallback

    callback = MlpkitCallback(guard=False)
    fitted(lightning, callback, through_forward=True, accumulate_grad_batches=2)
    assert callback.tracer.steps == 3

    class Stop(MlpkitCallback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("enough")

    stopped = Stop(guard=False)
    with pytest.raises(RuntimeError, match="enough"):
        fitted(lightning, stopped, through_forward=True)
    assert stopped.tracer.raised == "RuntimeError"
    seen = stopped.tracer.operations
    network()(torch.randn(2, 8))
    assert stopped.tracer.operations == seen


# Hugging Face


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


class Wrapped(nn.Module):
    """A network as the Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(transformers, states, **settings):
    x, y = batches()

    class States(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
            states.append(state_of(model) | {"lr": torch.tensor(lr_scheduler.get_last_lr()[0])})

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [{"x": row, "labels": label} for row, label in zip(x.flatten(0, 1), y.flatten())]
    arguments = transformers.TrainingArguments(
        "out", per_device_train_batch_size=16, num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, learning_rate=0.01, max_grad_norm=1.0, **settings,
    )  # fmt: skip
    return Ordered(Wrapped(), arguments, train_dataset=rows, callbacks=[States()])


@quiet
@pytest.mark.parametrize("optimizer", ["adamw_torch", "ours"])
def test_hugging_faces_fp16_skips_the_bad_batch_whole_and_says_why(transformers, optimizer):
    from mlpkit.guard import optim
    from mlpkit.interop.transformers import MlpkitCallback

    states = []
    trainer = trainer_of(transformers, states)
    if optimizer == "ours":
        trainer.optimizer = optim.AdamW(trainer.model.parameters(), lr=0.01)
    # accelerate refuses float16 on CPUs: what it sets on a GPU is set here.
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    callback = MlpkitCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert isinstance(trainer.accelerator.scaler, GradScaler)
    assert trainer.optimizer.scaler is trainer.accelerator.scaler
    (record,) = callback.records
    assert record.step == BAD
    assert all(torch.equal(states[BAD - 1][name], value) for name, value in states[BAD].items())
    assert not torch.equal(states[BAD]["net.0.weight"], states[BAD + 1]["net.0.weight"])
    assert states[BAD]["lr"] > states[BAD + 1]["lr"]
    found = callback.diagnosis
    assert (found.verdict, found.step, found.cause) == ("failure", BAD, "cast_overflow")
    assert "Step skipped" in found.sentence


@quiet
def test_hugging_faces_float32_is_traced_and_warned_that_nothing_is_guarded(transformers):
    from mlpkit.interop.transformers import MlpkitCallback

    states, plain = [], []
    trainer = trainer_of(transformers, states, gradient_accumulation_steps=2)
    callback = MlpkitCallback(trainer)
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match="guards nothing: mixed precision is 'no', and only 'fp16' has a scaler"):
        trainer.train()
    assert callback.records == []
    assert callback.tracer.steps == 3
    assert callback.diagnosis.verdict == "healthy"
    trainer_of(transformers, plain, gradient_accumulation_steps=2).train()
    assert all(torch.equal(states[-1][name], value) for name, value in plain[-1].items())


def test_arguments_of_a_callback_are_checked_before_training(transformers):
    from mlpkit.interop.transformers import MlpkitCallback

    with pytest.raises(ArgumentError, match="level is 'loud', must be one of observe, watch"):
        MlpkitCallback(None, trace="loud")
    with pytest.raises(ArgumentError, match="on_nonfinite"):
        MlpkitCallback(None, on_nonfinite="hope")
    with pytest.raises(ArgumentError, match="MlpkitCallback: model is the loop's"):
        MlpkitCallback(None, model=network())


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_library_the_pip_line_is_said(name, monkeypatch):
    for module in [*sys.modules]:
        if module.split(".")[0] == name or module == f"mlpkit.interop.{name}":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'pip install "mlpkit\[interop\]"'):
        __import__(f"mlpkit.interop.{name}")


# skorch


def test_skorch_trains_and_searches_over_a_network_of_ours():
    skorch = pytest.importorskip("skorch")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import GridSearchCV

    x, y = load_digits(return_X_y=True)
    x, y = (x[:600] / 16).astype(np.float32), y[:600].astype(np.int64)
    net = skorch.NeuralNetClassifier(
        MLP, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=5e-3, max_epochs=15, batch_size=64,
        module__in_features=64, module__hidden=(32,), module__out_features=10, train_split=None, verbose=0,
    )  # fmt: skip
    search = GridSearchCV(net, {"module__hidden": [(2,), (32,)]}, cv=2, scoring="accuracy").fit(x, y)
    assert search.best_params_ == {"module__hidden": (32,)}
    assert search.best_score_ > 0.6
    assert search.predict(x[:3]).shape == (3,)


# torch.export and ONNX


def exported_models():
    """What users carry away: networks of every norm, a member of a population, a tuned network."""
    from mlpkit.population import Member, Population

    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    for norm in (None, "batch", "layer"):
        yield f"norm {norm}", MLP(4, (8, 6), 3, activation="gelu", dropout=0.2, norm=norm)
    population = Population([Member(hidden=(8,), epochs=1)], x, y, loss="cross_entropy", progress=False)
    population.fit()
    yield "member", population.export(0)
    shared = FusedLinear(4, 4, activation="prelu")
    yield "parts", nn.Sequential(shared, nn.Sequential(shared, nn.LayerNorm(4)), MLP(4, (5,), 3))


@pytest.fixture(params=["norm None", "norm batch", "norm layer", "member", "parts"])
def carried(request):
    return next(model.eval() for name, model in exported_models() if name == request.param)


@quiet
def test_torch_export_keeps_the_fused_ops_saves_and_loads(carried):
    rows = torch.export.Dim("rows")
    program = torch.export.export(carried, (torch.randn(5, 4),), dynamic_shapes=({0: rows},))
    assert any("mlpkit" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(9, 4)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(x), carried(x))


def test_a_stock_copy_has_no_op_of_ours_and_leaves_the_model_alone(carried):
    before = copy.deepcopy(carried.state_dict())
    x = torch.randn(9, 4)
    plain = stock(carried)
    assert not any(isinstance(module, (MLP, FusedLinear)) for module in plain.modules())
    torch.testing.assert_close(plain(x), carried(x))
    assert all(torch.equal(before[name], value) for name, value in carried.state_dict().items())


@quiet
@pytest.mark.parametrize("carried", ["norm batch", "norm layer", "parts"], indirect=True)
def test_onnx_gives_the_same_numbers_for_any_number_of_rows(carried, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from mlpkit.interop.onnx import export

    export(carried, torch.randn(5, 4), tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    x = torch.randn(9, 4)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), carried(x).detach())


def test_onnx_export_says_what_it_wants():
    pytest.importorskip("onnxscript")
    from mlpkit.interop.onnx import export

    with pytest.raises(ArgumentError, match="export: example must be a tensor"):
        export(MLP(4, (3,), 2), [[1.0]], "none.onnx")
    with pytest.raises(ArgumentError, match="stock: model is int"):
        stock(3)


# TensorBoard


def test_tensorboard_reads_what_guard_and_trace_wrote(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mlpkit.guard import History, TrainStep
    from mlpkit.trace import Tracer

    model = MLP(8, (16,), 3)
    step = TrainStep(model, "cross_entropy", torch.optim.Adam(model.parameters()), history=History())
    x, y = batches()
    x[BAD] = torch.inf
    with Tracer(model) as tracer:
        for rows, labels in zip(x, y):
            step(rows, labels)
    step.history.write_tensorboard(tmp_path / "guard")
    tracer.write_tensorboard(tmp_path / "trace")
    guard, trace = (EventAccumulator(str(tmp_path / name)).Reload() for name in ("guard", "trace"))
    assert [event.step for event in guard.Scalars("guard/loss")] == list(range(6))
    assert any(tag.startswith("trace/log2_absmax/") for tag in trace.Tags()["scalars"])
    texts = [event.tensor_proto.string_val[0].decode() for event in trace.Tensors("trace/diagnosis/text_summary")]
    assert texts == [tracer.diagnosis.sentence]
