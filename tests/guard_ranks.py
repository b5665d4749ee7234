"""Two gloo ranks under guarded steps, started as ``python guard_ranks.py RANK FOLDER``: for test_guard_ranks.py.

Each rank writes what it saw to ``FOLDER/RANK.pt`` before the last case, in which rank 1 dies in the middle of a step.
"""

import copy
import os
import sys
import warnings
from functools import partial
from pathlib import Path

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mlpkit.guard import GradScaler, History, Snapshot, TrainStep

SIZE = 2


class InfBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf if ctx.bad else gradient, None


class Spoiler(nn.Module):
    bad = False
    dies = False

    def forward(self, x):
        if self.dies:
            os._exit(3)
        return InfBack.apply(x, self.bad)


class Run:
    """A network on this rank's half of each batch; ``wrap``: ddp or fsdp."""

    def __init__(self, wrap, optimizer="adam", **options):
        torch.manual_seed(3)
        layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), Spoiler(), nn.Dropout(0.2), nn.Linear(8, 3)]
        self.plain = nn.Sequential(*layers)
        self.rank = torch.distributed.get_rank()
        if wrap == "ddp":
            self.model = DistributedDataParallel(self.plain)
        else:
            mesh = init_device_mesh("cpu", (SIZE,))
            for layer in self.plain:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            self.model = fully_shard(self.plain, mesh=mesh)
        kind = {
            "adam": torch.optim.Adam,
            "sgd": torch.optim.SGD,
            "centred": partial(torch.optim.RMSprop, centered=True),
        }[optimizer]
        self.optimizer = kind(self.model.parameters(), lr=0.05)
        self.guarded = not options.pop("bare", False)
        self.options = options
        if self.guarded:
            self.renew()
        self.data = torch.Generator().manual_seed(7)
        torch.manual_seed(50 + self.rank)

    def renew(self):
        """Another guarded step of the same model and optimizer."""
        self.step = TrainStep(self.model, "cross_entropy", self.optimizer, **self.options)

    def batch(self):
        x, y = torch.randn(16, 5, generator=self.data), torch.randint(3, (16,), generator=self.data)
        return x[self.rank :: SIZE], y[self.rank :: SIZE]

    def take(self, count):
        return [self.step(*self.batch()) for _ in range(count)]

    def state(self):
        tensors = {**dict(self.plain.named_parameters()), **dict(self.plain.named_buffers())}
        for index, entries in enumerate(self.optimizer.state.values()):
            tensors.update({f"{index}.{key}": value for key, value in entries.items()})
        local = {name: one.to_local() if hasattr(one, "to_local") else one for name, one in tensors.items()}
        return {name: one.detach().clone() for name, one in local.items()}

    def spoil(self, fault, x):
        """The faults of which only rank 1 sees anything at first."""
        if self.rank == 1 and fault == "inputs":
            return x * torch.nan
        if self.rank == 1 and fault == "buffer":
            return x * 1e22
        self.plain[3].bad = self.rank == 1 and fault == "gradient"
        return x


def faults(wrap, fault, optimizer="adam", accumulate=1):
    """A run with a fault on rank 1, and its twin that has but its random numbers."""
    run, twin = (Run(wrap, optimizer, accumulate=accumulate, clip_norm=1.0) for _ in range(2))
    torch.manual_seed(60 + run.rank)
    run.take(2 * accumulate)
    if fault == "gradient":
        run.renew()
    before = run.state()
    x, y = run.batch()
    results = [run.step(run.spoil(fault, x), y)]
    run.spoil(None, x)
    results += [run.step(*run.batch()) for _ in range(accumulate - 1)]
    after, drawn = run.state(), torch.get_rng_state()
    norms = [result.grad_norm for result in run.take(2 * accumulate)]
    torch.manual_seed(60 + run.rank)
    twin.take(2 * accumulate)
    for _ in range(accumulate):
        twin.batch()
    torch.set_rng_state(drawn)
    twin.take(2 * accumulate)
    return {
        "skipped": [result.skipped for result in results],
        "record": run.step.records[0].to_dict(),
        "records": len(run.step.records),
        "before": before,
        "after": after,
        "end": run.state(),
        "twin": twin.state(),
        "norms": norms,
    }


def accumulation(wrap):
    """Two calls a step, against the loop by hand."""
    torch.manual_seed(9)
    run, bare = Run(wrap, "sgd", accumulate=2), Run(wrap, "sgd", bare=True)
    torch.manual_seed(70)
    run.take(4)
    torch.manual_seed(70)
    for _ in range(2):
        for last in (False, True):
            x, y = bare.batch()
            if wrap == "fsdp":
                bare.model.set_requires_gradient_sync(last)
            elif not last:
                with bare.model.no_sync():
                    (nn.functional.cross_entropy(bare.model(x), y) / 2).backward()
                continue
            (nn.functional.cross_entropy(bare.model(x), y) / 2).backward()
        bare.optimizer.step()
        bare.optimizer.zero_grad()
    return {"run": run.state(), "bare": bare.state()}


def scaler(wrap, fault):
    run = Run(wrap, bare=True)
    one = GradScaler("cpu", model=run.model)
    states = []
    for bad in (False, True, False):
        x, y = run.batch()
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run.model(run.spoil(fault if bad else None, x)), y)
        one.scale(loss).backward()
        one.step(run.optimizer)
        one.update()
        states.append(run.state())
    return {"records": [record.to_dict() for record in one.records], "states": states, "scale": one.get_scale()}


def reductions(wrap):
    """How many all-reduces of ours a clean step makes; DDP's and FSDP2's own are made elsewhere."""
    run = Run(wrap, clip_norm=1.0)
    run.take(1)
    calls, stock = [], torch.distributed.all_reduce

    def counted(tensor, *arguments, **options):
        calls.append(tensor.numel())
        return stock(tensor, *arguments, **options)

    torch.distributed.all_reduce = counted
    run.take(1)
    torch.distributed.all_reduce = stock
    return calls


def resumed(wrap, folder):
    """From a file, bit for bit."""
    run = Run(wrap)
    run.take(2)
    path = folder / f"resume.{wrap}.{run.rank}.pt"
    Snapshot.take(run.step).save(path)
    run.take(2)
    fresh = Run(wrap)
    Snapshot.load(path).restore(fresh.step)
    for _ in range(2):
        fresh.batch()
    fresh.take(2)
    return {"run": run.state(), "fresh": fresh.state()}


def dies(wrap, folder):
    """Rank 1 ends in the middle of step 3; nobody waits for it for ever."""
    run = Run(wrap, on_nonfinite="rollback", snapshot_every=1, snapshot_path=folder / f"{wrap}.pt", history=History())
    run.take(3)
    torch.save(run.state(), folder / f"{wrap}.{run.rank}.last.pt")
    torch.distributed.barrier()
    run.plain[3].dies = run.rank == 1
    try:
        run.take(1)
    except RuntimeError as error:
        (folder / "survivor.txt").write_text(str(error))


def main(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    seen = {}
    for wrap in ("ddp", "fsdp"):
        for fault in ("inputs", "gradient", "buffer"):
            seen[wrap, fault] = faults(wrap, fault)
        seen[wrap, "accumulated"] = faults(wrap, "inputs", accumulate=2)
        seen[wrap, "unproven optimizer"] = faults(wrap, "gradient", "centred")
        seen[wrap, "accumulation"] = accumulation(wrap)
        seen[wrap, "scaler"] = scaler(wrap, "gradient")
        seen[wrap, "scaler, bad loss"] = scaler(wrap, "inputs")
        seen[wrap, "reductions"] = reductions(wrap)
        seen[wrap, "resumed"] = resumed(wrap, folder)
    torch.save(copy.deepcopy(seen), folder / f"{rank}.pt")
    dies("fsdp", folder)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
