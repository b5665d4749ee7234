"""guard.GradScaler: all that torch.amp.GradScaler does, in its words."""

import copy
import pickle
import warnings

import pytest
import torch
from guard_loop import STOCK, Loop
from torch import nn

from mlpkit.errors import ArgumentError, DtypeError
from mlpkit.guard import GradScaler


def test_tensors_and_nested_iterables_are_scaled_by_the_scale():
    scaler = GradScaler("cpu", init_scale=2.0)
    one = torch.full((1,), 4.0)
    assert scaler.scale(one) == 8.0
    many = (one.clone(), [one.clone(), (one.clone(),)])
    scaled = scaler.scale(many)
    assert type(scaled) is tuple
    assert type(scaled[1]) is list
    assert (scaled[0], scaled[1][0], scaled[1][1][0]) == (8.0, 8.0, 8.0)
    assert [float(value) for value in scaler.scale(one.clone() for _ in range(3))] == [8.0] * 3
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        scaler.scale([3.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unscaling_divides_dense_and_sparse_gradients_and_finds_inf(dtype):
    for sparse in (False, True):
        for bad in (False, True):
            parameter = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
            optimizer = torch.optim.SGD([parameter], lr=1.0)
            scaler = GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            gradient = torch.tensor([[8.0, 0.0], [0.0, torch.inf if bad else 16.0]], dtype=dtype)
            parameter.grad = gradient.to_sparse() if sparse else gradient
            scaler.unscale_(optimizer)
            assert float(parameter.grad.to_dense()[0, 0]) == 2.0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scaler.step(optimizer)
            assert parameter.tolist()[0][0] == (0.0 if bad else -2.0)
            scaler.update()
            assert scaler.get_scale() == (2.0 if bad else 4.0)


def test_half_precision_gradients_are_refused_in_torchs_words_and_complex_ones_in_ours():
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for dtype, error, message in [
        (torch.float16, ValueError, "Attempting to unscale FP16 gradients"),
        (torch.complex64, DtypeError, r"gradient of group 0, parameter 0 \(2,\) is complex"),
    ]:
        parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
        parameter.grad = torch.ones(2, dtype=dtype)
        with pytest.raises(error, match=message):
            scaler.unscale_(torch.optim.SGD([parameter], lr=1.0))


def test_calls_out_of_order_are_refused_in_torchs_words():
    loop = Loop()
    with pytest.raises(AssertionError, match="Attempted step but _scale is None"):
        loop.scaler.step(loop.optimizer)
    with pytest.raises(AssertionError, match="Attempted update but _scale is None"):
        loop.scaler.update()
    loop.scaler.scale(loop.model(torch.randn(4, 5)).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        loop.scaler.update()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        loop.scaler.step(loop.optimizer, closure=lambda: None)
    loop.scaler.unscale_(loop.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        loop.scaler.unscale_(loop.optimizer)
    loop.scaler.step(loop.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        loop.scaler.unscale_(loop.optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        loop.scaler.step(loop.optimizer)
    with pytest.raises(AssertionError, match="only be pickled at the beginning"):
        pickle.dumps(loop.scaler)
    loop.scaler.update()
    empty = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        loop.scaler.step(empty)
    with pytest.raises(AssertionError, match="The growth factor must be > 1"):
        GradScaler("cpu", growth_factor=1.0)
    with pytest.raises(AssertionError, match="The backoff factor must be < 1"):
        GradScaler("cpu", backoff_factor=1.0)


def test_disabled_it_changes_nothing():
    loop = Loop(enabled=False)
    with torch.no_grad():
        loop.model[0].weight[0, 0] = torch.nan
    loss = torch.ones(())
    assert loop.scaler.scale(loss) is loss
    loop.take()
    assert loop.scaler.get_scale() == 1.0
    assert loop.scaler.state_dict() == {}
    assert not loop.scaler.is_enabled()
    assert not loop.model._forward_pre_hooks
    assert loop.scaler.steps == 0


def test_getters_setters_and_a_new_scale():
    scaler, stock = GradScaler("cpu"), STOCK("cpu")
    for one in (scaler, stock):
        one.set_growth_factor(3.0)
        one.set_backoff_factor(0.25)
        one.set_growth_interval(7)
        one.scale(torch.ones(()))
        one.update(128.0)
        assert one.get_scale() == 128.0
        one.update(torch.tensor(64.0))
        assert (one.get_growth_factor(), one.get_backoff_factor(), one.get_growth_interval()) == (3.0, 0.25, 7)
    assert scaler.state_dict() == stock.state_dict()
    with pytest.raises(AssertionError, match="new_scale should be a float or a 1-element"):
        scaler.update(torch.ones(2))
    with pytest.raises(ArgumentError, match=r"update: new_scale is 0\.0"):
        scaler.update(0.0)
    scaler.update(2.0**-20)  # asked for: the floor gives way
    assert scaler.get_scale() == 2.0**-20


@pytest.mark.parametrize("lazy", [False, True])
def test_state_goes_to_torchs_scaler_and_back(lazy):
    ours, stock = Loop(growth_interval=5, init_scale=256.0), Loop(STOCK)
    for _ in range(3):
        ours.take()
    if not lazy:
        stock.take()
    stock.scaler.load_state_dict(ours.scaler.state_dict())
    assert stock.scaler.state_dict() == ours.scaler.state_dict()
    again = GradScaler("cpu")
    again.load_state_dict(stock.scaler.state_dict())
    assert again.state_dict() == ours.scaler.state_dict()
    assert again._get_growth_tracker() == 3
    with pytest.raises(RuntimeError, match="source state dict is empty"):
        again.load_state_dict({})
    for bad in (0.0, 1e-321, torch.inf):
        with pytest.raises(ArgumentError, match="load_state_dict: scale is"):
            again.load_state_dict({**stock.scaler.state_dict(), "scale": bad})


def test_a_pickled_or_copied_scaler_goes_on_and_takes_a_model_again():
    loop = Loop(growth_interval=2)
    loop.take()
    for make in (lambda scaler: pickle.loads(pickle.dumps(scaler)), copy.deepcopy):
        again = make(loop.scaler)
        assert again.state_dict() == loop.scaler.state_dict()
        again.protect(loop.model)
        loop.scaler = again
        loop.take()
    assert again.get_scale() == 2 * 65536.0
    twin = copy.deepcopy(loop.model)  # an averaged copy, say: its forwards are no business of the scaler's
    twin(torch.randn(4, 5))
    assert not loop.scaler._gate.open
    pickle.loads(pickle.dumps(loop.model))(torch.randn(4, 5))
