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
