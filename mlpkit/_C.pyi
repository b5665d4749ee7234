from torch import Tensor

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
def mlp_step(
    x: Tensor,
    target: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    seed: Tensor | None,
    activation: str,
    negative_slope: float,
    p: list[float],
    loss: str,
    clip_norm: float,
    optimizer: str,
    group_of: list[int],
    firsts: list[Tensor | None],
    seconds: list[Tensor | None],
    steps: list[Tensor | None],
    groups: list[list[float]],
) -> tuple[bool, float, float]: ...
def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def force_cpu_capability(name: str) -> None: ...
def gemm_library() -> str: ...
def philox4x32(counter: list[int], key: list[int]) -> list[int]: ...
