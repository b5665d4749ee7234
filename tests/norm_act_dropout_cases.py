"""Cases of norm_act_dropout: one set of data, run by our op, by stock PyTorch and by stock PyTorch in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from closeness import SEEDS, assert_no_worse_than
from torch import Tensor

from mlpkit import reference

EPS = 1e-5
# rows, features: ragged in both directions; rows beyond one block of sums, and features beyond one part of a row.
SHAPES = [(5, 1), (7, 151), (151, 7), (129, 33), (300, 17), (33, 300)]

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of the op. fixed: the norm uses running averages; slopes: size of prelu's slope; offset: mean of z."""

    rows: int = 151
    cols: int = 129
    norm: str | None = "batch"
    activation: str = "relu"
    p: float = 0.3
    affine: bool = True
    fixed: bool = False
    slopes: int = 0
    offset: float = 0.5
    layout: str = "contiguous"

    def data(self, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs and dy of that seed, rounded to dtype; running averages of float32 (float64 for float64)."""
        generator = torch.Generator().manual_seed(2000 + seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        scales = torch.rand(self.cols, generator=generator) + 0.25
        z = (torch.randn(self.rows, self.cols, generator=generator) + self.offset) * scales
        data = {"z": z.to(dtype), "dy": draw(self.rows, self.cols)}
        if self.affine and self.norm:
            data |= {"weight": 1 + draw(self.cols) / 4, "bias": draw(self.cols) / 2}
        if self.slopes:
            data["slope"] = draw(self.slopes).abs() / 2
        if self.norm == "batch":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            data["running_mean"] = (torch.randn(self.cols, generator=generator) / 4).to(wide)
            data["running_var"] = (torch.rand(self.cols, generator=generator) + 0.5).to(wide)
        return {name: lay(tensor, self.layout) if name in ("z", "dy") else tensor for name, tensor in data.items()}

    def run(self, function, data: dict[str, Tensor], seed: int) -> Results:
        """y, all gradients and, in training, the moved averages, by ``function``: our op or the reference."""
        names = ("z", "weight", "bias", "slope")
        leaves = {name: data[name].detach().requires_grad_() for name in names if name in data}
        running = {name: data[name].clone() for name in ("running_mean", "running_var") if name in data}
        slope = leaves.get("slope", 0.1 if self.activation == "leaky_relu" else None)
        y = function(
            leaves["z"],
            self.norm,
            leaves.get("weight"),
            leaves.get("bias"),
            **running,
            eps=EPS,
            activation=self.activation,
            slope=slope,
            p=0.0 if self.fixed else self.p,
            training=not self.fixed,
            seed=torch.tensor([seed, 2]),
            stream=1,
        )
        y.backward(data["dy"])
        results = {"y": y} | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        if self.norm == "batch" and not self.fixed:
            results |= running
        return {name: t.detach() for name, t in results.items()}


@cache
def stock_and_exact(case: Case, dtype: torch.dtype) -> tuple[list[Results], list[Results]]:
    """What stock PyTorch gives in dtype, and what is exact for the same data and mask; a result per seed."""
    stock, exact = [], []
    for seed in SEEDS:
        data = case.data(seed, dtype)
        stock.append(case.run(reference.norm_act_dropout, matching(data, dtype), seed))
        if dtype == torch.float64:
            exact.append(long_sums(case, data, seed))
        else:
            exact.append(case.run(reference.norm_act_dropout, {k: t.double() for k, t in data.items()}, seed))
    return stock, exact


def matching(data: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The data as stock's batch norm takes them: weight, bias and averages of one dtype."""
    if dtype not in (torch.float16, torch.bfloat16) or "running_mean" not in data:
        return data
    return data | {name: data[name].float() for name in ("weight", "bias") if name in data}


def long_sums(case: Case, data: dict[str, Tensor], seed: int) -> Results:
    """What fp64 is measured against: the same formulas with every sum in NumPy's long double, rounded once to fp64."""

    def long(name: str):
        return data[name].detach().numpy().astype(np.longdouble)

    def rounded(a) -> Tensor:
        return torch.from_numpy(np.asarray(a, dtype=np.float64))

    z, axis = long("z"), 1 if case.norm == "layer" else 0
    if case.norm is None:
        mean, variance = 0, np.longdouble(1) - np.longdouble(EPS)
    elif case.fixed:
        mean, variance = long("running_mean"), long("running_var")
    else:
        mean, variance = z.mean(axis, keepdims=True), z.var(axis, keepdims=True)
    r = 1 / np.sqrt(variance + np.longdouble(EPS))
    x = (z - mean) * r if case.norm else z
    weight, bias = (long(name) if name in data else default for name, default in (("weight", 1), ("bias", 0)))
    u = rounded(x * weight + bias).requires_grad_()
    slope = data.get("slope", 0.1)
    p = 0.0 if case.fixed else case.p
    keep, scale = reference.dropout_mask(*z.shape, p, seed, 2, 1)
    mask = keep.double() * scale
    act = reference.activate(u, case.activation, slope)
    (du,) = torch.autograd.grad(act, u, data["dy"] * mask, retain_graph=True)
    du_long = du.numpy().astype(np.longdouble)
    g = du_long * weight
    taken = case.norm is not None and not case.fixed
    dz = r * (g - g.mean(axis, keepdims=True) - x * (g * x).mean(axis, keepdims=True)) if taken else r * g
    results = {"y": (act * mask).detach(), "gradient of z": rounded(dz if case.norm else g)}
    if "weight" in data:
        results |= {"gradient of weight": rounded((du_long * x).sum(0)), "gradient of bias": rounded(du_long.sum(0))}
    if case.slopes:
        by_col = ((data["dy"] * mask).numpy().astype(np.longdouble) * np.minimum(u.detach().numpy(), 0)).sum(0)
        results["gradient of slope"] = rounded(by_col if case.slopes > 1 else by_col.sum().reshape(1))
    if case.norm == "batch" and not case.fixed:
        moved = {"running_mean": mean[0], "running_var": variance[0] * case.rows / np.longdouble(case.rows - 1)}
        keep_share = np.longdouble(1.0 - 0.1)
        results |= {name: rounded(long(name) * keep_share + new * np.longdouble(0.1)) for name, new in moved.items()}
    return results


def assert_close(function, case: Case, dtype: torch.dtype) -> None:
    """y, every gradient and the moved averages err no more than stock PyTorch's."""
    stock, exact = stock_and_exact(case, dtype)
    ours = [case.run(function, matching(case.data(seed, dtype), dtype), seed) for seed in SEEDS]
    for name in exact[0]:
        columns = ([run[name] for run in runs] for runs in (ours, stock, exact))
        assert_no_worse_than(*columns, name=f"{case}: {name}")


def lay(t: Tensor, layout: str) -> Tensor:
    """The tensor in another memory layout."""
    if layout == "transposed":
        return t.T.contiguous().T
    if layout == "sliced":
        return t.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    if layout == "leading":
        return t.reshape(-1, 3, 1, t.shape[-1]).movedim(1, 0).contiguous().movedim(0, 1)
    if layout == "misaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].reshape(t.shape)
    return t
