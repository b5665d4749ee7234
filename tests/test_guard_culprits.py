"""Who is to blame for a skipped step, and what its record tells."""

import torch
from torch import nn

from mlpkit.guard import TrainStep


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


def guarded(loss="cross_entropy", model=None, **options):
    model = model or network()
    return TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_record_tells_step_culprit_kind_count_and_scale():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    step = guarded(model=model, precision="fp16")
    step(*batch())

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[0, :3] = torch.inf
        gradient[1, 0] = torch.nan
        return gradient

    handle = model[1].weight.register_hook(spoil)
    result = step(*batch())
    handle.remove()
    record = step.records[0]
    assert record is result.record
    assert (record.step, record.culprit, record.where, record.kind) == (1, "1.weight", "gradient", "NaN")
    assert (record.count, record.nans, record.infs, record.shape, record.tensors) == (4, 1, 3, (3, 4), 1)
    assert (record.scale, record.parameters) == (65536.0, 4)
    assert str(record) == (
        "Step 1: the gradient of 1.weight holds 1 NaN and 3 Inf (shape (3, 4)). The loss scale was 65536. "
        "Step skipped; 4 parameters were saved."
    )


def test_clipping_does_not_turn_an_infinite_gradient_into_another_fault():
    # The clipping factor of an infinite norm is 0, and 0 * Inf would be NaN.
    model = nn.Linear(5, 3)
    step = guarded(model=model, clip_norm=1.0)
    handle = model.bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    record = step(*batch()).record
    handle.remove()
    assert (record.culprit, record.kind, record.infs, record.nans) == ("bias", "Inf", 3, 0)


def test_an_infinite_loss_is_bad_even_when_its_gradients_are_finite():
    result = guarded(lambda output, target: output.mean() + torch.inf)(*batch())
    assert (result.culprit, result.record.kind) == ("loss", "Inf")


def test_a_bad_target_and_a_bad_loss_are_told_apart():
    model = nn.Linear(2, 1)
    assert guarded("mse", model)(torch.ones(3, 2), torch.full((3, 1), torch.nan)).culprit == "target"
    result = guarded("log_mse", model)(torch.ones(3, 2), torch.zeros(3, 1))
    assert (result.culprit, result.record.where) == ("loss", "loss")


def test_the_first_module_with_a_bad_output_is_named_and_a_mask_is_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = Mask()
            self.log = Log()

        def forward(self, x):
            return torch.softmax(self.mask(x), -1) + self.log(x - x)

    class Mask(nn.Module):
        def forward(self, x):
            return x.masked_fill(x == x.max(), -torch.inf)

    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x) * 0

    step = guarded("mse", nn.Sequential(nn.Linear(2, 3), Block()))
    result = step(torch.ones(4, 2), torch.zeros(4, 3))
    assert (result.culprit, result.record.kind, result.record.count) == ("forward of 1.log", "NaN", 12)


def test_looking_for_the_module_runs_no_code_of_the_model_itself():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return torch.log(x - x) * 0

    model = nn.Sequential(nn.Linear(2, 1), Counts())
    assert guarded("mse", model)(torch.ones(3, 2), torch.zeros(3, 1)).culprit == "forward of 1"
    assert model[1].calls == 1
    assert not model[1]._forward_hooks


def test_the_second_look_repeats_the_random_numbers_of_the_first():
    class Unlucky(nn.Module):
        def forward(self, x):
            return x * torch.where(torch.rand(()) < 0.5, torch.inf, 1.0)

    def noisy(output, target):
        return (output * torch.rand(3, 1)).mean()

    step = guarded(noisy, nn.Sequential(nn.Linear(2, 1), Unlucky()))
    seed = next(seed for seed in range(99) if _draws(seed) == [True, False])
    torch.manual_seed(seed)
    assert step(torch.ones(3, 2), torch.zeros(3, 1)).culprit == "forward of 1"
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    torch.rand(())
    torch.rand(3, 1)
    assert torch.equal(torch.get_rng_state(), after)


def _draws(seed):
    """Whether the forward is unlucky, and whether it would be a second time, after the numbers that the loss takes."""
    torch.manual_seed(seed)
    first = bool(torch.rand(()) < 0.5)
    torch.rand(3, 1)
    return [first, bool(torch.rand(()) < 0.5)]


def test_the_second_look_copies_no_parameter(monkeypatch):
    def refuse(self, memo):
        raise MemoryError("a copy of a parameter")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    assert guarded(precision="fp16")(batch()[0] * 1e6, batch()[1]).culprit == "forward of 0"


def test_a_model_that_cannot_be_copied_still_gets_a_record():
    class Locked(nn.Module):
        def forward(self, x):
            return torch.log(x - x) * 0

        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    result = guarded("mse", nn.Sequential(nn.Linear(2, 1), Locked()))(torch.ones(3, 2), torch.zeros(3, 1))
    assert result.culprit == "loss"
    assert "could not be replayed (TypeError: no copies)" in str(result.record)


def test_a_compiled_model_is_named_by_its_own_modules():
    model = nn.Sequential(nn.Linear(5, 3))
    step = guarded(model=torch.compile(model, backend="eager"), precision="fp16")
    x, y = batch()
    assert not step(x, y).skipped
    assert step(x * 1e6, y).culprit == "forward of 0"
    handle = model[0].weight.register_hook(lambda gradient: gradient * torch.nan)
    assert step(x, y).culprit == "0.weight"
    handle.remove()
