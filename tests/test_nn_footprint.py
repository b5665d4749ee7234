"""mlpkit.nn.memory_footprint: held to what autograd really saves, each storage once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpkit.errors import ArgumentError
from mlpkit.nn import ACTIVATIONS, MLP, FusedLinear, fuse, memory_footprint


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 33), nn.Linear(33, 3)

    def forward(self, x):
        return self.fc2(F.dropout(torch.relu(self.fc1(x)), 0.3, self.training))


def tied():
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    model[2].weight = model[0].weight
    return model


STOCK = {
    "relu": lambda: nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Dropout(0.2), nn.Linear(33, 3)),
    "in place": lambda: nn.Sequential(nn.Linear(7, 33), nn.ReLU(inplace=True), nn.Linear(33, 3)),
    "gelu": lambda: nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 3), nn.Sigmoid()),
    "batch norm": lambda: nn.Sequential(nn.Linear(7, 33), nn.BatchNorm1d(33), nn.SiLU(), nn.Linear(33, 3)),
    "layer norm": lambda: nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.PReLU(), nn.Linear(33, 3)),
    "frozen": lambda: nn.Sequential(nn.Linear(7, 33).requires_grad_(False), nn.Tanh(), nn.Linear(33, 3)),
    "functional": Functional,
    "tied": tied,
    "linear": lambda: nn.Linear(7, 3),
}
OURS = {
    **{
        f"{name} {p}": lambda name=name, p=p: FusedLinear(7, 33, activation=name, dropout=p)
        for name in ACTIVATIONS
        for p in (0.0, 0.25)
    },
    "network": lambda: MLP(7, (33, 20), 3, activation="gelu", dropout=0.1),
    "relu network": lambda: MLP(7, (33, 20), 3),
    "batch": lambda: MLP(7, (33, 20), 3, norm="batch", dropout=0.1),
    "layer": lambda: MLP(7, (33, 20), 3, norm="layer", activation="tanh"),
    "fused": lambda: fuse(STOCK["relu"]()),
    "fused prelu": lambda: fuse(nn.Sequential(nn.Linear(7, 33), nn.PReLU(), nn.Linear(33, 3))),
    "fused functional": lambda: fuse(Functional()),
}


def really_held(model, x):
    """Bytes that a real forward saves beside parameters, buffers and x; and those of its result where not saved."""
    known = {one.untyped_storage().data_ptr() for one in [x, *model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    result = y.untyped_storage()
    unsaved = result.nbytes() if result.data_ptr() not in saved else 0
    return sum(storage.nbytes() for storage in saved.values()), unsaved


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("name", [*STOCK, *OURS])
def test_the_prediction_is_what_is_really_held(name, rows):
    model = (STOCK | OURS)[name]()
    predicted = memory_footprint(model, rows)
    saved, result = really_held(model, torch.randn(rows, 7))
    assert predicted.saved == saved
    assert predicted.result == result
    assert predicted.input == rows * 7 * 4
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    assert predicted.parameters == sum(sizes)
    model(torch.randn(rows, 7)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert predicted.gradients == sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    assert predicted.buffers == sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    parts = (predicted.parameters, predicted.gradients, predicted.buffers, rows * 28, saved, result)
    assert predicted.training == sum(parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["relu", "layer norm", "network", "relu 0.25", "gelu 0.25"])
def test_every_dtype_is_predicted(name, dtype):
    model = (STOCK | OURS)[name]().to(dtype)
    predicted = memory_footprint(model, 33)
    assert (predicted.saved, predicted.result) == really_held(model, torch.randn(33, 7, dtype=dtype))


def test_layers_are_told_apart():
    model = nn.Sequential(nn.Linear(7, 32), nn.GELU(), FusedLinear(32, 48, dropout=0.5), nn.BatchNorm1d(48))
    linear, gelu, fused, norm = memory_footprint(model, 64).layers
    assert (linear.name, linear.kind, linear.parameters, linear.saved) == ("0", "Linear", 4 * (7 * 32 + 32), 0)
    assert linear.output == 4 * 64 * 32
    assert gelu.saved == 4 * 64 * 32  # z
    assert fused.saved == 4 * 64 * 32 + 64 * 48 // 8  # its input, and a bit for each output
    assert norm.buffers == 4 * (48 + 48) + 8
    assert norm.saved >= 4 * 64 * 48


def test_inference_takes_parameters_and_one_input_and_output():
    model = nn.Sequential(nn.Linear(7, 32), nn.Dropout(0.5), nn.Linear(32, 48), nn.ReLU(inplace=True), nn.Linear(48, 2))
    predicted = memory_footprint(model, 64)
    assert predicted.inference == predicted.parameters + 4 * 64 * (32 + 48)


def test_fusing_saves_what_the_prediction_says():
    model = nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3))
    assert memory_footprint(fuse(model), 128).saved < 0.6 * memory_footprint(model, 128).saved


def test_nothing_is_touched_and_nothing_is_allocated():
    model = MLP(7, (9,), 3, norm="batch", dropout=0.5).eval()
    model.blocks[0][0].train()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    # A batch of 400 GB: only a prediction can be that large.
    assert memory_footprint(model, 10**10).input == 28 * 10**10
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_other_inputs_have_a_shape():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())
    assert memory_footprint(model, 5, shape=(3, 10)).saved == 4 * 5 * 4 * 8
    with pytest.raises(ArgumentError, match="Sequential does not start with a linear layer; give the shape"):
        memory_footprint(model, 5)


def test_a_footprint_prints_as_a_table():
    lines = str(memory_footprint(nn.Sequential(nn.Linear(7, 32), nn.ReLU()), 64)).splitlines()
    assert lines[0] == "batch of 64: 17408 bytes for inference, 12032 for training"
    assert lines[1].split() == ["layer", "kind", "parameters", "gradients", "buffers", "output", "saved"]
    assert lines[2].split() == ["0", "Linear", "1024", "1024", "0", "8192", "0"]
    assert lines[-1].split() == ["total", "1024", "1024", "0", "8192"]


class Picks(nn.Linear):
    def forward(self, x):
        return super().forward(x[x.sum(1) > 0])


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (nn.Linear(2, 2), 0, "batch_size is 0; it must be an int of at least 1"),
        (nn.Linear(2, 2), 2.0, "batch_size is 2.0"),
        ("model", 2, "model is str; it must be an nn.Module"),
        (nn.ReLU(), 2, "ReLU does not start with a linear layer"),
        (Picks(2, 2), 2, "shapes in Picks depend on data"),
    ],
)
def test_wrong_arguments_are_named(model, rows, message):
    with pytest.raises(ArgumentError, match=f"memory_footprint: {message}"):
        memory_footprint(model, rows)
