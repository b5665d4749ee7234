"""Programs in which nothing went wrong, many of them full of Inf: no failure may be reported."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mlpkit
from mlpkit.trace import Tracer

INF = math.inf


class Attention(nn.Module):
    """Additive mask as a buffer made before tracing, and a masked_fill inside."""

    def __init__(self, width=16, length=6):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 3)
        self.register_buffer("mask", torch.full((length, length), -INF).triu(1))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / 4 + self.mask
        scores = scores.masked_fill(torch.eye(x.shape[1]).bool().roll(2, 1) & (self.mask < 0), -INF)
        return self.head(torch.softmax(scores, -1) @ v).mean(1)


def train(model, data, optimizer=None, steps=3, loss_of=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
    loss_of = loss_of or (lambda out: F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long)))
    for _ in range(steps):
        loss = loss_of(model(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def attention_with_infinite_masks():
    train(Attention(), torch.randn(4, 6, 16))


def scaled_dot_product_attention_with_a_boolean_mask():
    layer = nn.Linear(8, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()

    def loss_of(x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).mean()

    train(layer, torch.randn(2, 1, 5, 8), loss_of=loss_of)


def transformer_layer_with_a_padding_mask():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 16)
    for _ in range(2):
        layer(x, src_key_padding_mask=padding).mean().backward()


def dropout_and_batchnorm():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    train(model, torch.randn(16, 8))
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 8))


def mlpkit_layers():
    train(mlpkit.nn.MLP(8, [16, 16], 3, dropout=0.2, norm="batch"), torch.randn(16, 8))


def gradient_scaler_calibration():
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(30):
        with torch.autocast("cpu", torch.float16):
            loss = model(torch.randn(4, 8)).float().pow(2).mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**40


def scaled_loss_beyond_float16():
    model = nn.Linear(8, 3).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for _ in range(4):
        loss = model(torch.ones(4, 8).half()).pow(2).mean() + 1
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        for parameter in model.parameters():
            assert not torch.isfinite(parameter.grad).all()
        optimizer.zero_grad()
        scaler.update(scaler.get_scale() / 2)


def where_kills_a_nan():
    model = nn.Linear(4, 3)
    x = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    train(model, torch.where(x > 0, torch.log(x), 0.0))


def minimum_over_an_infinite_sentinel():
    w = torch.ones(5, requires_grad=True)
    best = torch.full((5,), INF)
    best = torch.minimum(best, w * 2)
    best.sum().backward()


def log_of_a_zero_one_mask():
    model = nn.Linear(4, 4)
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    train(model, torch.randn(3, 4), loss_of=lambda out: torch.softmax(out + torch.log(mask), -1)[:, 0].mean())


def max_pool_and_top_k():
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.MaxPool1d(3, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    train(model, torch.randn(2, 1, 8))
    logits = torch.randn(10)
    kept = logits.masked_fill(logits < logits.topk(3).values[-1], -INF)
    torch.multinomial(torch.softmax(kept, -1), 1)


def uninitialised_memory_is_written_before_it_is_read():
    buffer = torch.empty(4, 3)
    for row in range(4):
        buffer[row] = torch.ones(3) * row
    train(nn.Linear(3, 2), buffer)


def checkpointed_block():
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    head = nn.Linear(8, 3)
    for _ in range(2):
        head(checkpoint(block, torch.randn(4, 8), use_reentrant=False)).mean().backward()


def closure_optimizer():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    x, y = torch.randn(8, 4), torch.randn(8, 1)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def gradient_penalty():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (slope.norm(dim=1) - 1).pow(2).mean().backward()


def bf16_with_accumulation():
    model = nn.Linear(8, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(4, 8)).float().pow(2).mean() / 2
        loss.backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()


def guarded_step():
    model = mlpkit.nn.MLP(8, [16], 1)
    step = mlpkit.guard.TrainStep(model, "mse", torch.optim.Adam(model.parameters()), precision="fp16")
    for _ in range(4):
        step(torch.randn(4, 8), torch.randn(4, 1))


def recurrent_and_embedding():
    embedding, rnn, head = nn.Embedding(10, 8, padding_idx=0), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)
    for _ in range(2):
        head(rnn(embedding(torch.randint(0, 10, (2, 5))))[0][:, -1]).mean().backward()


def integers_and_empty_tensors():
    x = torch.arange(10)
    y = (x * 2).float()[:0]
    torch.cat([y, torch.ones(2)]).sum().item()


def evaluation_metrics():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        predictions = model(torch.randn(5, 4)).argmax(1)
        hits = (predictions == 7).float()
        precision = hits.sum() / hits.sum()  # 0 / 0, replaced below
        torch.nan_to_num(precision).item()


PROGRAMS = [
    attention_with_infinite_masks,
    scaled_dot_product_attention_with_a_boolean_mask,
    transformer_layer_with_a_padding_mask,
    dropout_and_batchnorm,
    mlpkit_layers,
    gradient_scaler_calibration,
    scaled_loss_beyond_float16,
    where_kills_a_nan,
    minimum_over_an_infinite_sentinel,
    log_of_a_zero_one_mask,
    max_pool_and_top_k,
    uninitialised_memory_is_written_before_it_is_read,
    checkpointed_block,
    closure_optimizer,
    gradient_penalty,
    bf16_with_accumulation,
    guarded_step,
    recurrent_and_embedding,
    integers_and_empty_tensors,
    evaluation_metrics,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_false_alarm(program):
    with Tracer() as tracer:
        program()
    assert tracer.diagnosis.verdict == "healthy", tracer.diagnosis.sentence
    assert [found.verdict for found in tracer.diagnoses] == ["benign"] * len(tracer.diagnoses)
    assert tracer.diagnosis.to_dict()["op"] is None
    assert tracer.operations > 0


@pytest.mark.parametrize(
    ("program", "op", "phase"),
    [
        (where_kills_a_nan, "log", "forward"),
        (log_of_a_zero_one_mask, "log", "forward"),
        (evaluation_metrics, "div", "forward"),
        (gradient_scaler_calibration, "_to_copy", "backward"),
    ],
)
def test_what_was_killed_is_listed_as_benign(program, op, phase):
    with Tracer() as tracer:
        program()
    assert (op, phase) in [(found.op, found.phase) for found in tracer.diagnoses]


def test_calibration_says_so_and_steps_are_counted_by_the_scaler():
    with Tracer() as tracer:
        gradient_scaler_calibration()
    assert tracer.steps == 30
    assert "the loss scale 1.1e12 was being calibrated (benign)." in tracer.diagnoses[0].sentence


def test_a_healthy_sentence_stands_alone():
    with Tracer() as tracer:
        train(nn.Linear(4, 3), torch.randn(2, 4), steps=5)
    assert tracer.diagnosis.sentence == (
        f"No failure in 5 steps: in {tracer.operations} operations no NaN or Inf reached a loss, parameter, optimizer "
        "state, buffer or returned value."
    )
