from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, device
from torch.nn import Module
from torch.optim import Optimizer

def linear_act_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    seed: Tensor | None,
    activation: str,
    negative_slope: float,
    p: float,
    stream: int,
) -> Tensor: ...
def norm_act_dropout(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    slope: Tensor | None,
    seed: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    negative_slope: float,
    p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]: ...
def drawn_seed(device: device) -> Tensor: ...
def mlp(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    slopes: list[Tensor | None],
    seed: Tensor | None,
    activation: str,
    negative_slope: float,
    p: list[float],
) -> Tensor: ...
def mlp_norm(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    slopes: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None],
    means: list[Tensor | None],
    variances: list[Tensor | None],
    seed: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    negative_slope: float,
    p: list[float],
) -> tuple[Tensor, Tensor]: ...

class MlpStep:
    def __init__(
        self,
        *,
        layers: list[tuple[Tensor, Tensor | None, Tensor | None, tuple[Any, ...] | None]],
        optimizer: Optimizer,
        states: Sequence[tuple[int, dict[str, Any], str | None, str | None, str | None]],
        modules: list[Module],
        dicts: list[dict[str, Any]],
        entries: list[tuple[dict[str, Any], str]],
        rates: list[tuple[dict[str, Any], str]],
        hooks: list[dict[int, Any]],
        drawing: dict[str, Any] | None,
        precision: str,
        activation: str,
        negative_slope: float,
        loss: str,
        mean: bool,
        delta: float,
        label_smoothing: float,
        ignore_index: int,
        class_weights: Tensor | None,
        kind: str,
    ) -> None: ...
    def take(self, inputs: Any, target: Any, clip_norm: float, scale: float) -> tuple[float, float] | bool | None: ...
    def take_proven(
        self, inputs: Any, target: Any, clip_norm: float, scale: float
    ) -> tuple[float, float] | bool | None: ...

class HostUpdate:
    def __init__(self, kind: str) -> None: ...
    def prepared(self, fresh: list[int]) -> None: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        clip_norm: float,
        scale: Tensor | None,
        clean_steps: Tensor | None,
        found_inf: Tensor | None,
        rule: tuple[float, float, int, float, float] | None,
        force: bool,
        unscale: bool,
        torch: bool,
    ) -> tuple[bool, int, float, float, int, int, bool] | None: ...
    def census(self) -> list[tuple[int, int, int, float, float]]: ...
    def absmax(self) -> Tensor: ...
    def bytes(self) -> int: ...

class DeviceUpdate:
    def __init__(
        self,
        kind: str,
        rows: Sequence[
            tuple[
                Tensor,
                int,
                dict[str, Any],
                str | None,
                str | None,
                str | None,
                str | None,
                Tensor | None,
                bool,
            ]
        ],
        groups: list[list[Tensor]],
        state: dict[Tensor, Any],
    ) -> None: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        clip_norm: float,
        scale: Tensor | None,
        clean_steps: Tensor | None,
        found_inf: Tensor | None,
        rule: tuple[float, float, int, float, float] | None,
        force: bool,
    ) -> tuple[Tensor, Tensor] | None: ...
    def log(self) -> Tensor | None: ...

def unscale(groups: list[dict[str, Any]], scale: Tensor) -> tuple[Tensor, Tensor, float] | None: ...
def absmax(tensors: Sequence[Tensor | None]) -> Tensor: ...
def as_torch_now(attributes: dict[str, Any], groups: list[dict[str, Any]]) -> bool: ...
def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def force_cpu_capability(name: str) -> None: ...
def cuda_kernels() -> str: ...
def force_cuda_kernels(name: str) -> None: ...
def fp32_precision() -> str: ...
def set_fp32_precision(precision: str) -> None: ...
def gemm_library() -> str: ...
def philox4x32(counter: list[int], key: list[int]) -> list[int]: ...

class MemberProgress:
    epoch: int
    step: int
    taken: int
    skipped: int
    skips_in_a_row: int
    waited: int
    best_epoch: int
    stopped_step: int
    best: float
    mark: float
    status: str
    cause: str
    train_loss: list[float]
    validation_loss: list[float]
    metric: list[float]
    lr: list[float]

class Population:
    def __init__(
        self,
        loss: str,
        delta: float,
        metric: str,
        data: tuple[Tensor | None, ...],
        validation: tuple[Tensor | None, ...],
    ) -> None: ...
    def add(
        self, network: dict[str, Any], recipe: dict[str, Any], rows: Tensor, validation_rows: Tensor | None
    ) -> int: ...
    def state(self, id: int) -> Tensor: ...
    def tensors(self, id: int, best: bool) -> dict[str, Tensor]: ...
    def progress(self, id: int) -> MemberProgress: ...
    def steps_per_epoch(self, id: int) -> int: ...
    def work_per_epoch(self, id: int) -> float: ...
    def set_recipe(self, id: int, recipe: dict[str, Any]) -> None: ...
    def train(
        self, ids: list[int], epochs: int, threads: int, poll: Callable[[int, int, int, float, float], bool]
    ) -> int: ...
    def predict(self, ids: list[int], x: Tensor, best: bool, threads: int) -> Tensor: ...

def peaks(tensors: Sequence[Tensor | None]) -> list[float]: ...

class ObservedRecord:
    index: int
    op: str
    dtype: str
    place: tuple[int, str, int, int, int]
    parents: list[ObservedRecord]
    zero: int
    absmax: float
    multiplied: float
    value: str
    subject: str
    consumed: bool
    derived: bool
    nothing: bool

class Observer:
    step: int
    counting: bool
    ended: bool
    scaling: bool
    in_optimizer: bool
    paused: int
    depth: int
    operations: int
    learning_rate: float | None
    def __init__(self, host: Any, kind_of_file: Any, most_records: int) -> None: ...
    def start(self) -> bool: ...
    def stop(self) -> None: ...
    def here(self) -> bool: ...
    def follow(self, call: Any) -> Any: ...
    def adopt(self, module: Module, name: int) -> None: ...
    def forget(self, module: int) -> None: ...
    def remember(self, root: Module, tensors: list[Tensor]) -> None: ...
    def follow_backward(self, engine: Any) -> Any: ...
    def next_step(self) -> None: ...
    def name(self, tensor: Tensor, kind: str, name: str) -> None: ...
    def find(self, tensor: Tensor) -> tuple[Any, bool, str, str] | None: ...
    def twin(self, record: ObservedRecord) -> Any: ...
    def bad_records(self) -> list[Any]: ...
    def any_bad(self) -> bool: ...
    def unscaled(self, loss: Tensor) -> float: ...
    def any_gradient_of_zeros(self) -> bool: ...
    def begin_update(self, optimizer: Any) -> bool: ...
    def end_update(self, optimizer: Any) -> bool: ...
    def unmoved(self) -> tuple[list[Tensor], int]: ...
    def series_of(self, record: ObservedRecord) -> list[tuple[int, float]]: ...
    def sites(self) -> list[tuple[str, int, str, int, list[tuple[int, float]]]]: ...
    def modules(self) -> dict[int, list[tuple[int, float]]]: ...
    def parameters(self) -> dict[str, tuple[list[tuple[int, float]], Any]]: ...
    def line(self, number: int) -> tuple[str, int]: ...
    def node(self, number: int) -> str: ...

def observed() -> bool: ...
def followed() -> bool: ...

class Outputs:
    paused: bool
    def __init__(self, host: Any) -> None: ...
    def follow(self, call: Any) -> Any: ...
    def stop(self) -> None: ...
    def adopt(self, module: Module, name: str) -> None: ...
    def forget(self, module: int) -> None: ...
    def any(self) -> bool: ...
    def take(self) -> dict[str, float]: ...
    def limits(self) -> dict[str, float]: ...
