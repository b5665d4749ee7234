"""Op pages: what ``torch.compile`` and autocast must know of each operator. Importing the package registers them."""

from mlpkit.ops import linear_act_dropout, mlp, norm_act_dropout

__all__ = ["linear_act_dropout", "mlp", "norm_act_dropout"]
