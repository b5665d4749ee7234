"""Operations that a bundle may run: arithmetic on the tensors it brings.

None reads files, allocates by a number or calls back.
"""

from __future__ import annotations

_ELEMENTS = """
abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh ceil clamp clamp_max clamp_min clone copysign cos
cosh deg2rad digamma div elu erf erfc erfinv exp exp2 expm1 fill floor floor_divide fmax fmin fmod frac gelu hardshrink
hardsigmoid hardswish hardtanh heaviside hypot i0 ldexp leaky_relu lerp lgamma log log10 log1p log2 log_sigmoid_forward
logaddexp logaddexp2 logical_not logit masked_fill maximum minimum mish mul nan_to_num neg nextafter polygamma pow
prelu rad2deg reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus
softshrink special_entr special_erfcx special_expm1 special_i0e special_i1 special_i1e special_log_ndtr special_ndtri
special_xlog1py special_zeta sqrt square sub tan tanh threshold trunc where xlogy _to_copy copy
"""
_SUMS = """
all amax amin aminmax argmax argmin cummax cummin cumprod cumsum dot linalg_vector_norm linalg_cross logcumsumexp
logsumexp max mean median min mode nanmedian nansum norm prod std std_mean sum var var_mean vdot
_softmax _log_softmax softmax log_softmax cosine_similarity dist renorm trace _cdist_forward _pdist_forward
"""
_PRODUCTS = """
_addmm_activation addbmm addmm addmv addr baddbmm bmm convolution _convolution linear matmul mm mv outer
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math mkldnn_linear
"""
_LAYERS = """
native_layer_norm native_batch_norm native_group_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
_fused_rms_norm cudnn_batch_norm batch_norm_stats embedding binary_cross_entropy huber_loss l1_loss mse_loss
nll_loss_forward nll_loss2d_forward smooth_l1_loss avg_pool1d avg_pool2d max_pool2d_with_indices max_pool3d_with_indices
adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d avg_pool3d kl_div multi_margin_loss soft_margin_loss
glu gather index_select cat stack flip tril triu
"""
_BACKWARD = """
sigmoid_backward tanh_backward threshold_backward gelu_backward silu_backward elu_backward hardswish_backward
hardsigmoid_backward hardtanh_backward leaky_relu_backward softplus_backward mish_backward log_sigmoid_backward
logit_backward softshrink_backward _softmax_backward_data _log_softmax_backward_data native_layer_norm_backward
native_batch_norm_backward native_group_norm_backward convolution_backward embedding_dense_backward
binary_cross_entropy_backward huber_loss_backward mse_loss_backward smooth_l1_loss_backward nll_loss_backward
nll_loss2d_backward max_pool2d_with_indices_backward avg_pool2d_backward _adaptive_avg_pool2d_backward glu_backward
_prelu_kernel_backward _prelu_kernel rms_norm_backward _fused_rms_norm_backward linear_backward
_scaled_dot_product_flash_attention_for_cpu_backward soft_margin_loss_backward _cdist_backward
"""
_LISTS = """
_foreach_abs _foreach_add _foreach_addcdiv _foreach_addcmul _foreach_copy _foreach_div _foreach_exp _foreach_lerp
_foreach_log _foreach_max _foreach_maximum _foreach_minimum _foreach_mul _foreach_neg _foreach_norm _foreach_pow
_foreach_reciprocal _foreach_rsqrt _foreach_sign _foreach_sqrt _foreach_sub _foreach_clamp_max _foreach_clamp_min
_fused_adam _fused_adamw _fused_sgd _fused_adagrad _amp_foreach_non_finite_check_and_unscale
"""
_NAMES = frozenset(" ".join((_ELEMENTS, _SUMS, _PRODUCTS, _LAYERS, _BACKWARD, _LISTS)).split())
_OWN = ("linear_act_dropout", "norm_act_dropout")


def is_allowed(op: str) -> bool:
    """Whether a bundle may name this operation (``aten::add_``)."""
    namespace, _, name = op.partition("::")
    if namespace == "mlpkit":
        return name.removesuffix("_forward").removesuffix("_backward") in _OWN
    return namespace == "aten" and (name in _NAMES or (name.endswith("_") and name.removesuffix("_") in _NAMES))
