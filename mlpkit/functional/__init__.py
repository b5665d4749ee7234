"""Functions on tensors: what users call. Each opens with its stock PyTorch equivalent."""

from mlpkit.functional._fp32_precision import get_fp32_precision, set_fp32_precision
from mlpkit.functional._linear_act_dropout import linear_act_dropout
from mlpkit.functional._mlp import mlp
from mlpkit.functional._norm_act_dropout import norm_act_dropout
from mlpkit.ops.guarded_update import guarded_update

__all__ = [
    "get_fp32_precision",
    "guarded_update",
    "linear_act_dropout",
    "mlp",
    "norm_act_dropout",
    "set_fp32_precision",
]
