"""mlpkit.nn.fuse: equal outputs, and the same parameters under the same names."""

import copy
import pickle

import pytest
import torch
from nn_fuse_cases import CALLS, MODULES, Attributes, assert_equal_twin, layers_of, rows
from torch import nn
from torch.nn import functional as F

from mlpkit.nn import MLP, FusedLinear, fuse, fuse_report


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_sequential_chain_becomes_one_layer(name, bias):
    model = nn.Sequential(
        nn.Linear(7, 9, bias), copy.deepcopy(MODULES[name]), nn.Dropout(0.25), nn.Linear(9, 3)
    ).double()
    fused = assert_equal_twin(model, count=1)
    assert (fused[0].activation, fused[0].dropout) == (name.partition(" ")[0], 0.25)
    assert [type(part).__name__ for part in fused[2:]] == ["Identity", "Linear"]
    assert type(model[0]) is nn.Linear, "the old model was changed"


def test_a_chain_without_dropout_or_without_activation_is_fused_too():
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 9), nn.Dropout(0.5), nn.Linear(9, 3)).double()
    fused = assert_equal_twin(model, count=2)
    assert [(layer.activation, layer.dropout) for layer in layers_of(fused)] == [("tanh", 0.0), ("identity", 0.5)]


def test_nested_sequentials_are_one_chain():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(7, 9), nn.Identity()),
        nn.Sequential(nn.GELU(), nn.Sequential(nn.Dropout(0.5))),
        nn.Sequential(nn.Linear(9, 4), nn.SiLU()),
    ).double()
    fused = assert_equal_twin(model, count=2)
    assert layers_of(fused)[0].dropout == 0.5


def test_one_activation_object_may_serve_many_chains():
    act, drop = nn.ReLU(), nn.Dropout(0.1)
    assert_equal_twin(nn.Sequential(nn.Linear(7, 9), act, drop, nn.Linear(9, 3), act, drop).double(), count=2)


@pytest.mark.parametrize("name", CALLS)
def test_a_function_or_method_after_a_linear_is_fused(name):
    call, activation = CALLS[name]
    fused = assert_equal_twin(Attributes(call).double(), count=1)
    assert (fused.fc1.activation, fused.fc1.dropout) == (activation, 0.5)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_attribute_after_a_linear_is_fused(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.drop = nn.Linear(7, 9), copy.deepcopy(MODULES[name]), nn.Dropout(0.5)
            self.blocks = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))

        def forward(self, x):
            x = self.drop(self.act(self.fc1(x)))
            for block in self.blocks:
                x = self.drop(self.act(block(x)))
            return x

    fused = assert_equal_twin(Net().double(), count=3)
    assert {(layer.activation, layer.dropout) for layer in layers_of(fused)} == {(name.partition(" ")[0], 0.5)}


def test_a_functional_prelu_takes_the_slope_of_its_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(7, 9), nn.PReLU()

        def forward(self, x):
            return F.prelu(self.fc(x), self.act.weight)

    assert_equal_twin(Net().double(), count=1)


def test_sequentials_inside_a_traced_module_and_modules_inside_sequentials_are_fused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), Attributes())
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            x = self.head(x)
            for block in self.blocks:
                x = x + block(x)
            return x

    assert_equal_twin(Net().double(), count=4)


def test_parts_of_children_that_have_no_forward_and_tuples_and_dicts_are_fused_through():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.box, self.heads = nn.Module(), nn.ModuleDict({"left": nn.Linear(7, 7)})
            self.box.fc = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
            z = torch.relu(self.box.fc(x.view(x.size(0), -1)))
            z += y
            return z, {"left": self.heads["left"](z).tanh(), "rows": x.shape[0]}

    model = Net().double()
    fused = fuse(model)
    assert [type(fused.get_submodule(name)) for name in ("box.fc", "heads.left")] == [FusedLinear] * 2
    torch.testing.assert_close(fused(rows(), rows()), model(rows(), rows()))


def test_state_that_the_forward_does_not_use_and_plain_attributes_stay():
    class Net(Attributes):
        def __init__(self):
            super().__init__()
            self.spare, self.width = nn.Linear(2, 2), 9
            self.register_buffer("mean", torch.zeros(7))
            self.register_buffer("cache", torch.zeros(1), persistent=False)
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return super().forward(x - self.mean) * self.gain

    fused = assert_equal_twin(Net().double(), count=1)
    assert fused.width == 9
    assert repr(fused).startswith("FusedNet(")


def test_training_and_eval_go_on_after_the_fusion():
    for model in (Attributes().double(), nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Dropout(0.5)).double()):
        fused = fuse(model.eval())
        assert torch.equal(fused(rows()), fused(rows()))
        fused.train()
        assert not torch.equal(fused(rows()), fused(rows()))
        assert torch.equal(fused.eval()(rows()), fused(rows()))


def test_a_dropout_that_stays_follows_the_mode_of_the_fused_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(7, 64), nn.LayerNorm(64)

        def forward(self, x):
            return F.dropout(self.norm(torch.relu(self.fc(x))), training=self.training)

    fused = assert_equal_twin(Net().double().eval(), count=1)
    assert (fused(rows()) == 0).sum() == 0
    assert 0.3 < (fused.train()(rows()) == 0).double().mean() < 0.7


def test_a_dropout_keeps_a_mode_of_its_own():
    model = nn.Sequential(nn.Linear(7, 64), nn.Sigmoid(), nn.Dropout(0.5)).eval()
    model[2].train()
    assert (fuse(model)(rows(dtype=torch.float32)) == 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype):
    fused = fuse(nn.Sequential(nn.Linear(7, 9), nn.ReLU()).to(dtype))
    assert fused(rows(dtype=dtype)).dtype == dtype


def test_an_optimizer_made_before_goes_on():
    model = nn.Sequential(nn.Linear(7, 9), nn.PReLU(), nn.Linear(9, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = fuse(model)
    before = [parameter.detach().clone() for parameter in fused.parameters()]
    fused(rows()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, fused.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["sequential", "traced", "prelu"])
def test_fused_models_copy_pickle_move_and_load(kind):
    parts = (nn.Linear(7, 9), nn.PReLU() if kind == "prelu" else nn.ReLU(), nn.Linear(9, 3))
    fused = fuse(Attributes() if kind == "traced" else nn.Sequential(*parts)).double().eval()
    expected = fused(rows())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(rows()), expected)
        for parameter in twin.parameters():
            torch.nn.init.constant_(parameter, 0.5)
        assert not torch.equal(twin(rows()), expected)
        twin.load_state_dict(fused.state_dict())
        assert torch.equal(twin(rows()), expected)
    assert torch.equal(fused(rows()), expected)


@pytest.mark.parametrize("make", [Attributes, lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU())])
def test_hooks_of_a_container_go_on(make):
    model, calls = make(), []
    model.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    fused = fuse(model)
    assert len(layers_of(fused)) == 1
    y = fused(rows(dtype=torch.float32))
    assert calls == [y.shape]


def random_chain(generator):
    """A Sequential of random parts, now and then nested: most are fused somewhere, some nowhere."""

    def pick(count):
        return int(torch.randint(count, (), generator=generator))

    # Not in place: after a sigmoid or a relu PyTorch itself refuses that.
    parts = [part for name, part in MODULES.items() if name != "relu inplace"]
    parts += [nn.Dropout(0.3), nn.Dropout(0.0), nn.Identity(), nn.LayerNorm(7), nn.Softplus()]
    chosen = [nn.Linear(7, 7)]
    for _ in range(1 + pick(7)):
        one = nn.Linear(7, 7, bool(pick(2))) if pick(2) else copy.deepcopy(parts[pick(len(parts))])
        chosen.append(nn.Sequential(one, random_chain(generator)) if pick(8) == 0 else one)
    return nn.Sequential(*chosen)


def test_random_chains_keep_their_outputs():
    fused = 0
    for seed in range(60):
        torch.manual_seed(seed)
        model = random_chain(torch.Generator().manual_seed(seed)).double()
        fused += len(layers_of(assert_equal_twin(model)))
    assert fused > 60


def test_fusing_twice_changes_nothing_more():
    for model in (Attributes(), nn.Sequential(nn.Linear(7, 9), nn.ReLU()), MLP(7, (9,), 3), nn.ReLU(), nn.Linear(2, 2)):
        fused = fuse(model)
        assert fuse(fused) is fused
    traced = fuse(Attributes())
    assert [entry.status for entry in fuse_report(traced).entries] == ["fused", "left"]


def test_a_fused_model_compiles_into_one_graph():
    torch.compiler.reset()
    for model in (Attributes(), nn.Sequential(nn.Linear(7, 9), nn.PReLU(), nn.Dropout(0.5))):
        fused = fuse(model).eval()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(rows(dtype=torch.float32)), fused(rows(dtype=torch.float32)))
