"""Cases of linear_act_dropout: one set of data, run by our op, by stock PyTorch and by stock PyTorch in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from closeness import SEEDS, assert_no_worse_than
from torch import Tensor

from mlpkit import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOW_DTYPES = [torch.bfloat16, torch.float16]
# rows, in_features, out_features: ragged in every direction, and one of each alone.
SHAPES = [(1, 1, 1), (1, 151, 7), (7, 1, 151), (151, 7, 1), (7, 129, 151), (151, 7, 129)]
LAYOUTS = ["transposed", "sliced", "expanded", "leading", "misaligned"]

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of the op; ``slopes`` is the size of prelu's slope, ``layout`` how x, weight and dy lie in memory."""

    rows: int = 151
    inner: int = 129
    cols: int = 151
    activation: str = "relu"
    p: float = 0.3
    bias: bool = True
    slopes: int = 0
    layout: str = "contiguous"

    def data(self, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs and dy of that seed, rounded to dtype; a prelu slope among them if there is one."""
        generator = torch.Generator().manual_seed(1000 + seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        data = {
            "x": draw(self.rows, self.inner),
            "weight": draw(self.cols, self.inner),
            "dy": draw(self.rows, self.cols),
        }
        data["weight"] /= math.sqrt(self.inner)
        if self.bias:
            data["bias"] = draw(self.cols)
        if self.slopes:
            data["slope"] = draw(self.slopes).abs() / 2
        return {name: _lay(tensor, name, self.layout) for name, tensor in data.items()}

    def run(self, function, data: dict[str, Tensor], seed: int) -> Results:
        """y and the gradients of all inputs, on the CPU, by ``function``: our op or the reference."""
        leaves = {name: t.detach().requires_grad_() for name, t in data.items() if name != "dy"}
        slope = leaves.get("slope", 0.1 if self.activation == "leaky_relu" else None)
        words = torch.tensor([seed, 2], device=data["x"].device)
        y = function(
            leaves["x"],
            leaves["weight"],
            leaves.get("bias"),
            activation=self.activation,
            slope=slope,
            p=self.p,
            seed=words,
            stream=1,
        )
        y.backward(data["dy"])
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        return {name: t.detach().cpu() for name, t in {"y": y, **gradients}.items()}


@cache
def stock_and_exact(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Results], list[Results]]:
    """What stock PyTorch gives in dtype, and what is exact for the same data and mask; a result per seed."""
    stock, exact = [], []
    for seed in SEEDS:
        data = case.data(seed, dtype)
        stock.append(case.run(reference.linear_act_dropout, {k: t.to(device) for k, t in data.items()}, seed))
        if dtype == torch.float64:
            exact.append(long_sums(case, data, seed))
        else:
            exact.append(case.run(reference.linear_act_dropout, {k: t.double() for k, t in data.items()}, seed))
    return stock, exact


def long_sums(case: Case, data: dict[str, Tensor], seed: int) -> Results:
    """What fp64 is measured against: the same formulas with every sum in NumPy's long double, rounded once to fp64."""

    def long(t: Tensor):
        return t.detach().reshape(-1, t.shape[-1]).numpy().astype(np.longdouble)

    def rounded(a, like: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(a, dtype=np.float64)).reshape(like.shape)

    x, weight, dy = (long(data[name]) for name in ("x", "weight", "dy"))
    bias = long(data["bias"]) if case.bias else 0
    z = rounded(x @ weight.T + bias, data["dy"]).requires_grad_()
    slope = data.get("slope", 0.1)
    keep, scale = reference.dropout_mask(*dy.shape, case.p, seed, 2, 1)
    mask = keep.double().reshape(z.shape) * scale
    act = reference.activate(z.reshape(dy.shape), case.activation, slope).reshape(z.shape)
    y = (act * mask).detach()
    (dz,) = torch.autograd.grad(act, z, data["dy"] * mask)
    results = {"y": y}
    results["gradient of x"] = rounded(long(dz) @ weight, data["x"])
    results["gradient of weight"] = rounded(long(dz).T @ x, data["weight"])
    if case.bias:
        results["gradient of bias"] = rounded(long(dz).sum(0), data["bias"])
    if case.slopes:
        by_col = (long(data["dy"] * mask) * np.minimum(long(z), 0)).sum(0)
        results["gradient of slope"] = rounded(by_col if case.slopes > 1 else by_col.sum(), data["slope"])
    return results


def assert_close(function, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """y and every gradient err no more than stock PyTorch's."""
    device = torch.device(device)
    stock, exact = stock_and_exact(case, dtype, device.type)
    ours = [case.run(function, {k: t.to(device) for k, t in case.data(seed, dtype).items()}, seed) for seed in SEEDS]
    for name in exact[0]:
        columns = ([run[name] for run in runs] for runs in (ours, stock, exact))
        assert_no_worse_than(*columns, name=f"{case}: {name}", independent=case.rows * case.cols)


def _lay(t: Tensor, name: str, layout: str) -> Tensor:
    """The tensor in another memory layout; ``expanded`` repeats its first row, for ours and stock alike.

    ``misaligned`` is contiguous, but begins one element after an allocation: no vector access may count on alignment.
    """
    if layout == "leading" and name in ("x", "dy"):
        return t.reshape(-1, 3, 1, t.shape[-1]).movedim(1, 0).contiguous().movedim(0, 1)
    if layout == "misaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].reshape(t.shape)
    if t.dim() == 1:
        return t if layout == "contiguous" else t.repeat_interleave(2)[::2]
    if layout == "transposed":
        return t.T.contiguous().T
    if layout == "sliced":
        return t.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t
