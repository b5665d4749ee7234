"""mlpkit.nn.fuse: equal outputs, the same parameters under the same names, and a reason for all that is left."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from mlpkit.errors import ArgumentError
from mlpkit.nn import MLP, FusedLinear, fuse, fuse_report

MODULES = {
    "relu": nn.ReLU(),
    "relu inplace": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}
CALLS = {
    "F.relu": (lambda z: F.relu(z), "relu"),
    "F.relu in place": (lambda z: F.relu(z, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    ".relu()": (lambda z: z.relu(), "relu"),
    ".relu_()": (lambda z: z.relu_(), "relu"),
    "clamp": (lambda z: z.clamp(min=0), "relu"),
    "torch.clamp": (lambda z: torch.clamp(z, 0.0), "relu"),
    "clamp_min": (lambda z: z.clamp_min(0), "relu"),
    "F.gelu": (lambda z: F.gelu(z), "gelu"),
    "F.gelu tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "F.silu": (lambda z: F.silu(z), "silu"),
    "torch.sigmoid": (torch.sigmoid, "sigmoid"),
    ".sigmoid()": (lambda z: z.sigmoid(), "sigmoid"),
    "F.tanh": (torch.tanh, "tanh"),
    ".tanh()": (lambda z: z.tanh(), "tanh"),
    "F.leaky_relu": (lambda z: F.leaky_relu(z, 0.3), "leaky_relu"),
}


def rows(count=12, features=7, dtype=torch.float64):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(5), dtype=dtype)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def reasons(model):
    return {entry.name: entry.what for entry in fuse_report(model).entries if entry.status == "left"}


def assert_equal_twin(model, x=None, count=None):
    """Fuse and compare: state, parameters, eval outputs, gradients. Returns the fused model."""
    x = rows() if x is None else x
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(fused.state_dict()) == list(state)
    assert all(torch.equal(fused.state_dict()[name], value) for name, value in state.items())
    ours, theirs = dict(fused.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    modes = [module.training for module in model.modules()]
    results = []
    for twin in (model, fused):
        twin.eval()
        y = twin(x.clone())
        y.square().sum().backward()
        results.append((y.detach(), [parameter.grad for parameter in model.parameters()]))
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*results)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    if count is not None:
        assert len(layers_of(fused)) == count
    return fused


class Attributes(nn.Module):
    """A module with a forward of its own: linear, activation and functional dropout."""

    def __init__(self, call=F.relu, p=0.5):
        super().__init__()
        self.fc1, self.fc2, self.call, self.p = nn.Linear(7, 9), nn.Linear(9, 3), call, p

    def forward(self, x):
        return self.fc2(F.dropout(self.call(self.fc1(x)), self.p, self.training))


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


# What is left, and why.


def hooked(part):
    part.register_forward_hook(lambda *_: None)
    return part


class Subclass(nn.Linear):
    pass


class Ternary(nn.Linear):
    def forward(self, x):
        return super().forward(x).sign()


def replaced(part):
    part.forward = lambda x: x
    return part


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (lambda: (hooked(nn.Linear(7, 7)), nn.ReLU()), "Linear has a hook"),
        (lambda: (nn.Linear(7, 7), hooked(nn.ReLU())), "ReLU has a hook"),
        (lambda: (parametrizations.weight_norm(nn.Linear(7, 7)), nn.ReLU()), "parametrised|subclass"),
        (lambda: (weight_norm(nn.Linear(7, 7)), nn.ReLU()), "weight is computed"),
        (lambda: (Subclass(7, 7), nn.ReLU()), "Subclass is a subclass of nn.Linear"),
        (lambda: (Ternary(7, 7), nn.ReLU()), "Ternary is a subclass of nn.Linear"),
        (lambda: (replaced(nn.Linear(7, 7)), nn.ReLU()), "forward was replaced"),
        (lambda: (nn.Linear(7, 7), nn.PReLU(7)), "PReLU with a slope per channel"),
        (lambda: (nn.Linear(7, 7), nn.BatchNorm1d(7), nn.ReLU()), "no activation or dropout follows"),
        (lambda: (nn.Linear(7, 7), hooked(nn.Identity()), nn.ReLU()), "no activation or dropout follows"),
        (lambda: (nn.Linear(7, 7, dtype=torch.complex64), nn.Tanh()), "no torch.complex64"),
        (lambda: (nn.Linear(7, 7, device="meta"), nn.Tanh()), "no kernel for meta"),
        (lambda: (hooked(nn.Sequential(nn.Linear(7, 7))), nn.ReLU()), "no activation or dropout follows"),
    ],
)
def test_a_sequential_keeps_what_cannot_be_fused(parts, reason):
    model = nn.Sequential(*parts())
    assert fuse(model) is model
    (why,) = reasons(model).values()
    assert any(one in why for one in reason.split("|")), why


def test_shared_linears_stay():
    shared = nn.Linear(7, 7)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU())
    assert fuse(model) is model
    assert reasons(model)["0"] == "it is shared: registered at 2 places"
    block = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
    assert reasons(nn.Sequential(block, block))["0.0"] == "it is shared: registered at 2 places"
    prelu = nn.PReLU()
    assert reasons(nn.Sequential(nn.Linear(7, 7), prelu, nn.Linear(7, 7), prelu))["0"] == "its PReLU is shared"


class Traced(nn.Module):
    """Two linears and a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)
        self.act, self.seq, self.count, self.log = nn.ReLU(), nn.Sequential(nn.Linear(7, 7), nn.ReLU()), 0, []
        self.register_buffer("steps", torch.zeros(()))


def traced(forward):
    return type("Net", (Traced,), {"forward": forward})(forward)


def branching(self, x):
    return torch.relu(self.a(x)) if x.sum() > 0 else self.b(x)


def counting(self, x):
    self.count += 1
    return torch.relu(self.a(x))


def logging(self, x):
    self.log.append(1)
    return torch.relu(self.a(x))


def buffering(self, x):
    self.steps += 1
    return torch.relu(self.a(x))


def drawing(self, x):
    return torch.relu(self.a(x)) if random.random() < 2 else x


def noisy(self, x):
    return torch.relu(self.a(x) + torch.randn(7))


def modal(self, x):
    return torch.relu(self.a(x)) if self.training else self.a(x)


def reused(self, x):
    z = self.a(x)
    return torch.relu(z) + z


def twice(self, x):
    return torch.relu(self.a(torch.relu(self.a(x))))


def opened(self, x):
    z = self.seq[0](x)
    return self.seq[1](z) + z


def outside(self, x):
    return torch.relu(self.a(x)) + self.act(x)


def typed(self, x):
    return torch.relu(self.a(x)) if isinstance(x, torch.Tensor) else self.a(x)


def asking(self, x):
    return torch.relu(self.a(x)) if torch.is_tensor(x) else self.a(x)


@pytest.mark.parametrize(
    ("forward", "name", "reason"),
    [
        (typed, "a", "asks for the type of a value"),
        (asking, "a", "asks for the type of a value"),
        (lambda self, x: torch.relu(self.a(input=x)), "a", "called with other arguments than one tensor"),
        (branching, "a", "torch.fx cannot trace it"),
        (counting, "a", "changes self.count"),
        (logging, "a", "changes a list of its own"),
        (buffering, "a", "changes a dict of its own"),
        (drawing, "a", "draws random numbers"),
        (noisy, "a", "makes tensors of its own"),
        (modal, "a", "other things in training"),
        (reused, "a", "its result is used at several places"),
        (twice, "a", "it is called at 2 places"),
        (opened, "seq.0", "its result is used at several places"),
        (outside, "seq.0", "does not call it"),
        (lambda self, x, mask=None: torch.relu(self.a(x)), "a", "optional arguments"),
        (lambda self, x, *rest: torch.relu(self.a(x)), "a", "optional arguments"),
        (lambda self, x: self.a(x).clamp(min=0, max=6), "a", "clamp with bounds"),
        (lambda self, x: self.a(x).clamp(min=0.1), "a", "clamp with bounds"),
        (lambda self, x: F.dropout(self.a(x), 0.5), "a", "does not follow self.training"),
        (lambda self, x: F.dropout(self.a(x), 0.5, False), "a", "does not follow self.training"),
        (lambda self, x: F.prelu(self.a(x), self.b.bias[:1]), "a", "belongs to no nn.PReLU"),
        (lambda self, x: torch.sub(1, self.a(x)), "a", "no activation or dropout follows"),
    ],
)
def test_a_traced_module_keeps_what_cannot_be_fused(forward, name, reason):
    model = traced(forward)
    modes, state = [module.training for module in model.modules()], (random.getstate(), torch.get_rng_state())
    assert reason in reasons(model)[name]
    fused = fuse(model)
    assert not isinstance(fused.get_submodule(name), FusedLinear)
    assert [module.training for module in model.modules()] == modes
    assert (model.count, model.log, model.steps.item()) == (0, [], 0)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    torch.manual_seed(1)
    expected = model.eval()(rows(dtype=torch.float32))
    torch.manual_seed(1)
    torch.testing.assert_close(fused.eval()(rows(dtype=torch.float32)), expected)


class Untraced(nn.Module):
    """Cannot be traced; calls one Sequential as a whole and opens another."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
        self.parts = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
        self.a = nn.Linear(7, 7)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        z = self.parts[0](self.whole(x))
        return torch.relu(self.a(self.parts[1](z) + z))


def test_what_an_untraceable_module_only_calls_is_fused_and_the_rest_is_left():
    fused = assert_equal_twin(Untraced().double(), count=1)
    assert isinstance(fused.whole[0], FusedLinear)
    assert set(reasons(Untraced())) == {"parts.0", "a"}


def test_modules_kept_outside_of_the_tree_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
            self.order = [self.net]

        def forward(self, x):
            return self.order[0](x)

    model = Net()
    assert fuse(model) is model
    assert "in self.order" in reasons(model)["net.0"]


def test_pytorchs_own_layers_stay():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert fuse(model) is model
    assert "inside TransformerEncoderLayer" in reasons(model)["0.linear1"]


def test_the_report_prints_as_a_table():
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Dropout(0.25), FusedLinear(9, 9), nn.Linear(9, 3))
    assert str(fuse_report(model)).splitlines() == [
        "layer  status   what or why",
        "0      fusible  relu, dropout 0.25",
        "3      fused    relu",
        "4      left     no activation or dropout follows",
    ]
    assert [entry.status for entry in fuse_report(fuse(model)).entries] == ["fused", "fused", "left"]


def test_only_modules_are_fused():
    for function in (fuse, fuse_report):
        with pytest.raises(ArgumentError, match=f"{function.__name__}: model is str; it must be an nn.Module"):
            function("model")
